"""Rounded activations, schemes, memory and rotation in docs/results.md."""

from __future__ import annotations

import re
from typing import Any

from quantine.eval.footprint import OPT, footprints
from results_tables import closeness, head, line, read

GB = 1e9
ROUNDED = "activations-opt-mini-outlier-all"
"""Name of a file of `benchmarks/activations.py`."""
SITES = "sites-demo"
"""Name of a file of `benchmarks/sites.py`."""
ACTIVATIONS = """
## RPTQ: activations in clusters of reordered channels

RPTQ (section 3): channels differ so much in range that one grid for all of them ruins most;
clusters of channels with similar ranges do not. Here is an OPT of 6 blocks, 256 wide, with
channel ranges as large OPT models have them: some channels are 3 to 100 times the others. One
site at a time is rounded to 4 bits, everything else is float; the squared change of a token's
output relative to its square, mean of all tokens and of two blocks:

```sh
python benchmarks/activations.py MODEL wikitext2_valid.txt --blocks 1 4 --json rounded.json
```

"""
COUNTED = """
The error by the number of clusters (grids from smallest to largest value):

![Change of the output against the number of clusters, a line for each site](clusters.png)

```sh
python benchmarks/activations.py MODEL wikitext2_valid.txt --blocks 1 4 \\
    --clusters 1 2 4 8 16 32 64 --plot clusters.png
```

What each reorder contributes to the predictions of the demo model, a llama with grouped heads and
rotary positions: KL divergence from the float model where only the outputs of norms (R1 and R4),
queries and keys (R2, which are not reordered, but have clusters), values and what attention makes
of them (R3), or the hidden channels of the MLP (R5) are rounded to 4 bits:

```sh
python benchmarks/sites.py demo wikitext2_valid.txt wikitext2_test.txt --samples 8 --limit 4 \\
    --json sites.json
```

"""
SCHEMES = """
### Schemes of weights and activations

RPTQ (table 1): 4 bit weights with 8 bit activations, with 4 bit ones, and with 4 or 3 bit keys and
values only ("KV"). Norm outputs and softmax keep 8 bits unless a row says strict. Weights by GPTQ,
a grid for each row and cluster. In brackets, where measured: KL divergence from the float model.

```sh
python benchmarks/schemes.py MODEL wikitext2_valid.txt --texts wikitext2_test.txt \\
    --schemes W4A16 W4A8 W4A4 W4A4KV W4A3KV W3A3KV W16A8 W16A4 --variants - faithful \\
    --json rows.json
```
"""
ORDER = (
    *("W4A16", "W4A8", "W4A4", "W4A4KV", "W4A3KV", "W3A3KV"),
    *("W16A8", "W16A4", "W16A4KV", "W16A3KV"),
)
"""Of columns, as in the paper's table."""
VARIANTS = {
    "": "clusters, searched (default)",
    "faithful": "clusters, as published (`-faithful`)",
    "strict": "searched, strict (`-strict`)",
    "strict-faithful": "as published, strict",
    "tensor": "one static grid, searched (`-tensor`)",
    "tensor-faithful": "one static grid, as published",
    "token": "a grid for each token (`-token`)",
}
SCHEME_TABLES: tuple[tuple[str, str, str], ...] = (
    (
        "schemes-opt-mini-outlier-all",
        "#### The same model: an OPT with the channel ranges of large ones",
        """RPTQ's published code, measured on the same model and text: W4A16 147.00, W4A8 146.80,
W4A4 147.29 (strict 148.12), W4A4KV 147.13, W4A3KV 147.57, W3A3KV 148.26, W16A8 146.64, W16A4 146.92
(strict 147.61); without reorder W4A4 225.23, W4A4KV 181.06, W4A3KV 192.70; a grid for each token,
W16A4, 161.88. Differences below 0.3 are chance.""",
    ),
    (
        "schemes-opt-mini-outlier",
        "#### The same function with loud channels in norm outputs only",
        """RPTQ's published code: W4A16 147.10, W4A8 147.06, W4A4 147.34, W4A4KV 147.28,
W4A3KV 147.55, W3A3KV 147.96, W16A8 146.75, W16A4 147.00.""",
    ),
    (
        "schemes-opt-mini",
        "#### The same function without loud channels",
        """RPTQ's published code: W4A16 146.83, W4A8 146.97, W4A4 147.26, W4A4KV 147.16,
W4A3KV 147.54, W3A3KV 147.90, W16A8 146.74, W16A4 146.98.""",
    ),
    (
        "schemes-demo",
        "#### The demo model: llama type, grouped heads, rotary positions",
        """SmolLM2-135M, `--samples 16 --seqlen 1024 --window 1024 --limit 24 --bfloat16 --kl`; rows
as published with `--samples 32 --seqlen 512`. The model's weights lie on a 4 bit grid of 32
inputs, so 4 bit weights in other groups cost it more than most models. Rows in which tokens have
factors were made before these had a limit; W16A8 with it has 21.112. With `--samples 64` W4A16 has
21.715 and W4A4KV 22.368: 4 bit keys and values cost 3.0%, with 16 samples 3.4%.

On C4 (24 windows, float 36.730), with 16 bit weights and in the order of clusters, one static
grid, a grid for each token: A8 37.107 (KL 0.0090), 93.337 (0.9795), 37.371 (0.0163); A4 65.129
(0.5830), 1485.956 (3.7762), 141.581 (1.3633). So 8 bit activations cost 0.4 and 1.0%.""",
    ),
)
"""File of `benchmarks/schemes.py`, heading, and what is to be said of it."""
BUDGETED = """
#### Budgets, errors by the loss, and compensation

Most of what is lost with 8 bit activations is the weights' part, and half of it with 4 bit keys and
values. Weights may be chosen by a budget of as many bits as GPTQ's clusters take, count errors by
the loss, and make up for errors before them, also for those of activations. The price is speed:
groups of such weights span clusters, so matrices multiply floats and not integers. WikiText-2, 24
windows of 1024; segments are of 512 tokens of two texts, where the table above has 16 of 1024, of
WikiText-2 alone:

```sh
quantine quantize demo out --scheme W4A8 --bits-per-weight 4.95 --both-axes \\
    --calibration mixed.txt --samples 256 --loss-weights --compensate --bfloat16
quantine eval out --reference demo --text wikitext2_test.txt --window 1024 --limit 24
```

"""
BUDGETED_ROWS = (
    ("W4A8", "256", "compensate-demo-W4A8-4.95"),
    ("W4A4KV", "128", "compensate-demo-W4A4KV-4.95"),
    ("W4A4KV, tuned", "128", "compensate-demo-W4A4KV-4.95-tuned"),
    ("W4A4KV-rotated-mixed (c)", "128", "rotated-values-demo-W4A4KV-4.95"),
    ("W4A3KV-rotated-mixed (c)", "128", "rotated-values-demo-W4A3KV-4.95"),
    ("W3A3KV-rotated-mixed", "128", "rotated-values-demo-W3A3KV-3.90"),
    ("W4A4-rotated (a), (b)", "128", "rotated-inputs-demo-W4A4-4.95"),
    ("W4A4-strict-rotated (b)", "128", "rotated-inputs-demo-W4A4-strict-4.95"),
    ("W4A4-strict-rotated-mixed", "128", "rotated-values-demo-W4A4-strict-4.95"),
)
"""Scheme, segments of two texts, and scores by `quantine eval`."""
BUDGETED_AFTER = """
"Tuned" is `quantine resume out --tune whole`: 64 steps of the whole, 31 minutes of processor time
of one thread, in which grids of keys and values follow gradients, too. The part of the text that
judges went from 0.0510 to 0.0481.

(a) Before channels were centred and smoothed, see below. (b) When `-rotated` did not rotate values.
(c) Untuned. When all blocks rotated values, and what the first tokens of texts cost was not counted
for channels of keys without bits.

#### Rotated values, and keys with bits where they help

With 3 bits, keys and values alone (`W16A3KV`) cost 0.1706. Values [rotated with a factor for each
token and head](activations.md#rotated-values) and [keys of different
bits](activations.md#keys-with-bits-where-they-help) leave 0.1022 (± 0.0023), perplexity 22.79; with
4 bit weights behind, made to make up for it, 0.1029. Tried before they were built, with all else in
floats, the first token of a text, too, and simple static grids without feedback (6 windows):

| 3 bits | keys | values |
|---|---|---|
| a grid for each channel | 0.126 | 0.068 |
| bits shared out, 1 by 1 | 0.062 | 0.061 |
| bits shared out, 2 by 2, as it is now | 0.055 | |
| principal components, bits shared out 2 by 2 | 0.059 | 0.083 (1 by 1) |
| factors, bits shared out 1 by 1 | 0.054 | 0.036 |
| factors, principal components, bits shared out 1 by 1 | 0.075 | 0.034 |
| factors, rotated after whitening by the matrix behind | 0.159 | 0.027 |
| factors, rotated, as it is now | | 0.025 |
| less their mean before rotary embeddings, bits shared out 2 by 2 | 0.037 | |

So keys want bits and values want factors. The last row is of a mean that
turns with the position of a token, of which static grids otherwise have to hold the whole circle.
As it was built since, with a [centre](activations.md#keys-less-a-centre-that-turns) of its own for
the first token, it takes `W16A3KV` from 0.1022 to 0.0699 (± 0.0021), perplexity 22.65
(`W16A3KV-rotated-mixed-centred`); the rows above are without it. Rotated values without factors
left 0.1683. On opt-mini-outlier-all, where channels of values are loud all the time, no block
rotates its values, and scores stay what they are (W4A4KV 0.0006, W16A3KV 0.0012); rotated
everywhere they would be 0.0015 and 0.0040.

#### Inputs that are rotated while the model runs

Behind the MLP's activation a few channels of each token are loud, and no order of channels tells
them apart: rounded to 4 bits there alone, the demo model lost 0.29. With [rotated
inputs](activations.md#rotated-inputs) W4A4 leaves a third of what it left with clusters, and half
where norm outputs have 4 bits, too; the weights of a budget are part of it. One site at a time in
4 bits, as in the first table of this section (means of blocks 5, 15 and 25 of the demo model, and
of 1 and 4 of opt-mini-outlier-all):

```sh
python benchmarks/activations.py MODEL wikitext2_valid.txt --rotated --blocks 5 15 25 \\
    --json rotated.json
```

"""
ROTATED_SITES = {
    "demo": "rotated-sites-demo",
    "opt-mini-outlier-all": "rotated-sites-opt-mini-outlier-all",
}
"""Changes of blocks' outputs in clusters and rotated, by model."""
ROTATED_SITES_AFTER = """
Where the same channels are always loud, as in that OPT, clusters separate them. A rotation alone
left it with 0.0076 for W4A4 and 0.1225 for the strict one (GPTQ, a scale for each cluster; 16
segments of 256 tokens, 48 windows of 256). With channels divided by `(a / w)^(1/4)` before, it
comes near clusters, with fewer bits, as there are fewer clusters to have scales for:

"""
BESIDE_CLUSTERS = "rotated-inputs-opt-mini-outlier-all"
"""Scores of schemes with and without rotated inputs."""
MEMORY = """
### Memory

RPTQ (section 4.3): weights, keys and values, and activations of 64 sequences of 8192 tokens, in GB
(1e9 bytes), from configurations alone: `quantine memory opt-66b --batch 64 --seqlen 8192`.

"""
MEMORY_AFTER = """
OPT-66B takes {saved:.0f} GB less with W4A4 than with W4A16; the paper says more than 900. Of these,
{cache:.0f} are keys and values (2 x 64 blocks x 64 x 8192 tokens x 9216 channels, at 2 bytes and at
half a one), the rest temporary activations of one block. Attention scores are taken not to be
written out: in 16 bit, those of 72 heads would add 618 GB to every scheme. Weights count a 16 bit
scale and a zero point for each row and cluster, and what queries, keys and values of less than
8 bits need to be rounded channel by channel.
"""
ROTATION = """
## Rotation

`--rotate` [rotates](plans.md#rotation) hidden states and values before anything else. KL divergence
from the float model without it and with it, at the same bits per weight of the matrices in blocks;
`one cluster` means norm outputs and values on one grid each, where others have a grid for each
cluster of channels, and weights in groups of 64. A rotated file has the table twice.

```sh
python benchmarks/rotation.py MODEL wikitext2_valid.txt --texts TEXT ... --cache DIR --json FILE
```
"""
ROTATIONS: dict[str, tuple[str, str]] = {
    "rotation-demo": (
        "### The demo model",
        """8 windows of 1024 tokens of each text (float 23.477 and 32.720), 16 segments of 512
tokens to learn from. GPTQ loses 7% of its divergence on WikiText-2 and 15% on C4, although the
model's own weights lie on a 4 bit grid of 32 inputs, which a rotation leaves. The file grows from
107.5 to 164.1 MB, as the table is there twice. SpQR and rounded activations are still to
be measured on this model. Under a budget, which has axes, widths and outliers to choose from, a
rotation is of no use: at 3.3 bits along both axes (24 windows of 1024 tokens) it leaves 0.1707 on
WikiText-2 and 0.2893 on C4 in float32, without it 0.1576 and 0.2813 were left in bfloat16.""",
    ),
    "rotation-opt-mini-outlier-all": (
        "### An OPT with the channel ranges of large ones",
        """`--samples 16 --seqlen 256 --window 256 --limit 48`; float 146.599. Where single channels
are loud, a rotation more than halves the divergence of 3 bit weights: GPTQ with it is better than
SpQR without, and outliers take another quarter off. Where activations are rounded in clusters it
does harm: clusters separate the loud channels, and behind a rotation there is nothing to separate.
With one grid for all channels a rotation takes nearly all of the harm away, but not as much as
clusters do. So rotate weights, and leave a scheme of clusters as it is. What is not in the table
was not measured.""",
    ),
}
"""Files of `benchmarks/rotation.py`, headings, and what is to be said of each."""
ROTATED = "rotated "
"""How names of rows with a rotation begin."""


def rounded(name: str) -> str:
    """What rounding one site of activations does, by kind of grid."""
    found = read(name)
    lines = head(["", *found["sites"]])
    for name, changes in found["changes"].items():
        lines.append(line([name, *(f"{value:.2e}" for value in changes)]))
    return "\n".join(lines) + "\n"


def contributions() -> str:
    """Divergences by reorder and kind of grid."""
    rows = read(SITES)
    lines = head(["", *next(iter(rows.values()))])
    for name, row in rows.items():
        lines.append(line([name, *(f"{value:.4f}" for value in row.values())]))
    return "\n".join(lines) + "\n"


def schemes(name: str) -> str:
    """Perplexities, and divergences where they were measured, by variant and scheme."""
    rows = {row["scheme"]: row for row in read(name)}
    reference = rows.pop("float")["texts"]
    split = {scheme: scheme.partition("-")[::2] for scheme in rows}
    present = dict.fromkeys(scheme for scheme, _ in split.values())
    names = [scheme for scheme in ORDER if scheme in present]
    lines = []
    for text, score in reference.items():
        lines += [f"{text}: float {score['perplexity']:.3f} ± {score['stderr']:.2f}", ""]
        lines += head(["", *names])
        for suffix, label in VARIANTS.items():
            found = [rows.get(f"{scheme}-{suffix}".removesuffix("-")) for scheme in names]
            if any(found):
                lines.append(line([label, *(_cell(row and row["texts"][text]) for row in found)]))
        lines.append("")
    return "\n".join(lines)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    kl = "" if score["kl"] is None else f" ({score['kl']:.4f})"
    return f"{score['perplexity']:.3f}{kl}"


def budgeted() -> str:
    """Scores of schemes whose weights are a budget's, beside those with GPTQ's."""
    plain = {row["scheme"]: row["texts"] for row in read("schemes-demo")}
    lines = head(
        ["scheme", "segments", "bits per weight", "perplexity", "KL", "KL of the table above"]
    )
    for scheme, segments, file in BUDGETED_ROWS:
        row = read(file)
        score = row["texts"]["wikitext2_test.txt"]
        name = re.split(r"-rotated|[, ]", scheme)[0]
        before = plain[name]["wikitext2_test.txt"]["kl"]
        bits = f"{row['bits_per_weight']:.3f}"
        lines.append(line([scheme, segments, bits, *closeness(score), f"{before:.4f}"]))
    return "\n".join(lines) + "\n"


def rotated_sites() -> str:
    """Changes of blocks' outputs where inputs of matrices are in clusters, and rotated."""
    found = {model: read(name) for model, name in ROTATED_SITES.items()}
    lines = head(["", *next(iter(found.values()))["sites"]])
    for model, measured in found.items():
        for how, changed in measured["changes"].items():
            lines.append(line([f"{model}, {how}", *(f"{value:.2e}" for value in changed)]))
    return "\n".join(lines) + "\n"


def beside_clusters() -> str:
    """Scores of schemes with rotated inputs, and with clusters."""
    lines = head(["scheme", "bits per weight", "perplexity", "KL"])
    for row in read(BESIDE_CLUSTERS):
        score = row["texts"]["wikitext2_test.txt"]
        kl = f"{score['kl']:.5f} ± {score['kl_stderr']:.5f}"
        cells = [row["name"], f"{row['bits_per_weight']:.3f}", closeness(score)[0], kl]
        lines.append(line(cells))
    return "\n".join(lines) + "\n"


def memory() -> str:
    """Bytes of the models in the paper, by scheme."""
    found = {model: footprints(model, 64, 8192) for model in OPT}
    lines = head(["scheme", *(f"{model}: weights + cache + temporary = all" for model in found)])
    for rows in zip(*found.values(), strict=True):
        cells = [
            f"{row.weights / GB:.1f} + {row.cache / GB:.1f} + {row.temporary / GB:.1f} = "
            f"**{row.total / GB:.0f}**"
            for row in rows
        ]
        lines.append(line([rows[0].scheme, *cells]))
    large = {row.scheme: row for row in found["opt-66b"]}
    before, after = large["W4A16"], large["W4A4"]
    saved, cache = (before.total - after.total) / GB, (before.cache - after.cache) / GB
    return "\n".join(lines) + "\n" + MEMORY_AFTER.format(saved=saved, cache=cache)


def rotations(name: str) -> str:
    """Divergences by plan, without a rotation and with one."""
    rows = {row["name"]: row for row in read(name)}
    texts = list(next(iter(rows.values()))["texts"])
    columns = [f"{text}: {how}" for text in texts for how in ("as it is", "rotated")]
    lines = head(["", "bits per weight", *columns])
    for plan in dict.fromkeys(row.removeprefix(ROTATED) for row in rows):
        pair = [rows.get(plan), rows.get(f"{ROTATED}{plan}")]
        bits = next(f"{row['bits_per_weight']:.3f}" for row in pair if row)
        cells = [row and f"{row['texts'][text]['kl']:.4f}" for text in texts for row in pair]
        lines.append(line([plan, bits, *(cell or "" for cell in cells)]))
    return "\n".join(lines) + "\n"


def sections() -> list[str]:
    """All of it, in order."""
    parts = [ACTIVATIONS, rounded(ROUNDED), COUNTED, contributions(), SCHEMES]
    for name, title, remark in SCHEME_TABLES:
        parts.append(f"\n{title}\n\n{schemes(name)}\n{remark}\n")
    parts += [
        BUDGETED,
        budgeted(),
        BUDGETED_AFTER,
        rotated_sites(),
        ROTATED_SITES_AFTER,
        beside_clusters(),
        MEMORY,
        memory(),
        ROTATION,
    ]
    for name, (title, remark) in ROTATIONS.items():
        parts.append(f"\n{title}\n\n{rotations(name)}\n{remark}\n")
    return parts
