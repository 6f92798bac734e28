"""Write docs/results.md from the comparisons in benchmarks/results.

A table is a run of `quantine compare`: repeat the command above it, copy its comparison.json to
benchmarks/results/NAME.json, and run this again. Texts are files, as `quantine eval` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from quantine.comparison.table import markdown
from quantine.eval.footprint import OPT, footprints

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
GB = 1e9
AXES_BEFORE = "spqr-opt-mini"
"""The comparison that the table of axes follows."""


@dataclass(frozen=True)
class Table:
    """One comparison and what it is held against.

    Attributes:
        name: of its file in benchmarks/results.
        title: heading.
        claim: what the paper says, and how its table is laid out.
        command: that made it.
        limits: what the table cannot show.
    """

    name: str
    title: str
    claim: str
    command: str
    limits: str


TABLES = (
    Table(
        "methods-demo",
        "All three papers: methods side by side, with tasks",
        """SpQR (tables 1 and 2) and AdaDim (tables 2 to 4) compare perplexity and zero-shot tasks
at equal sizes: rounding to nearest (RTN) loses most, then GPTQ; axes chosen for each matrix and
outliers in 16 bit lose less. Below them a scheme of RPTQ.""",
        "quantine compare demo --plans preset:rtn:bits=4:group_size=64,"
        "preset:rtn:bits=3:group_size=64,preset:gptq:bits=4:group_size=64,"
        "preset:gptq:bits=3:group_size=64,preset:gptq-ada-3bit,preset:spqr-3bit,3.65,scheme:W4A4KV "
        "--calibration wikitext2_valid.txt --samples 32 --seqlen 512 --bfloat16 "
        "--text wikitext2_test.txt --window 1024 --limit 24 --tasks piqa_local,arc_easy_local "
        "--task-path TASKS --task-limit 200 --out methods",
        """41 minutes on two cores of an Intel Xeon with AMX, the float model included, killed once
with `kill -9` while the second plan was evaluated. The tasks are PIQA and ARC-easy with local
definitions. With 200 questions a standard error is 3.5 points, and the float model itself is 14
and 26 points above guessing: tasks do not order these plans, perplexity and KL do. The demo model's
weights lie on a 4 bit grid of 32 inputs. When this was measured, schemes decoded
through transformers, module by module; now they do
[natively](kernels.md#rounded-activations-while-decoding). The tokens/s of 4 bit RTN were taken
while something else ran: GPTQ's packed weights are of the same kind.""",
    ),
    Table(
        "spqr-opt-mini",
        "SpQR: size against quality, with GPTQ and RTN",
        """SpQR (tables 1 and 2): at equal size, outliers in 16 bit beside small groups with
quantized statistics lose less than GPTQ, which loses less than rounding to nearest (RTN); with
about 4.6 bits less than 1% is lost.""",
        "quantine compare opt-mini --plans preset:rtn:bits=4,preset:rtn:bits=3,preset:gptq:bits=4,"
        "preset:gptq:bits=3,preset:spqr-4bit,preset:spqr-3bit "
        "--calibration wikitext2_valid.txt --samples 32 --seqlen 256 --bfloat16 "
        "--text wikitext2_test.txt --window 256 --limit 256 --out spqr",
        """opt-mini is an OPT of 6 blocks, 256 wide, trained on little text. It has no outliers to
speak of, so all methods are close at 4 bits, and their order in perplexity is mostly noise; KL
orders them. Times and tokens/s were taken while others used the machine: compare no closer than
by a factor of three.""",
    ),
    Table(
        "budgets-demo",
        "AdaDim and SpQR: axes, outliers and widths chosen by a budget",
        """AdaDim (section 3.2) lets each layer choose the axis that its groups run along. Under a
budget the choice is between axes, widths, group sizes and thresholds of outliers (SpQR) at once, by
what it changes in the model's predictions.""",
        "quantine compare demo --plans 3.65:both_axes=true,4.25:both_axes=true,3.3:both_axes=true,"
        "4.7:both_axes=true,3.3,4.9 --calibration wikitext2_valid.txt --samples 32 --seqlen 512 "
        "--bfloat16 --text wikitext2_test.txt,c4_en_validation_500.jsonl --window 1024 --limit 24 "
        "--out budgets",
        """Both axes leave 6% less divergence than one at 3.3 bits. Times and tokens/s were taken
while others used the machine, and before groups along outputs had native products: those rows'
tokens/s are of decoding by PyTorch. All matrices inside of blocks are packed; table and head are
not.""",
    ),
    Table(
        "qwen",
        "Qwen2.5-Coder-0.5B: budgets and activations beside GPTQ and RTN",
        """The float model is a GGUF file in Q4_K_M (Q5_0 mostly) of 630 million weights, 358
million of them in blocks, so its weights lie on grids already. GPTQ and RTN have groups of 64;
budgets have groups along inputs. Table and head stay in 16 bit.""",
        "quantine compare qwen2.5-coder-0.5b.gguf --plans preset:rtn:bits=4:group_size=64,"
        "preset:gptq:bits=4:group_size=64,4.25,3.65,preset:gptq:bits=3:group_size=64,3.3,"
        "scheme:W4A8,scheme:W4A4KV,preset:rtn:bits=3:group_size=64 "
        "--calibration wikitext2_valid.txt --samples 16 --bfloat16 --text wikitext2_test.txt "
        "--window 1024 --limit 8 --out qwen",
        """Seconds and tokens/s were taken on one thread while others used the machine, and say
little.

Of the first 40 prompts of HumanEval, 28% are continued with the very 32 tokens of the float model,
each the likeliest, at 4.25 bits, and 20% at 3.65; 14.7 and 11.1 tokens are the same before the
first that differs (`python benchmarks/continuations.py`; all 164 were not run, nor peers).""",
    ),
    Table(
        "qwen-1.5b",
        "Qwen2.5-Coder-1.5B: SpQR at 4 bits",
        """A GGUF file of Q4_K_M is the float model here, of 1.5 billion weights: compared is what a
second rounding loses, and what a run takes.""",
        "quantine compare qwen2.5-coder-1.5b.gguf --plans preset:spqr-4bit "
        "--calibration wikitext2_valid.txt --samples 8 --bfloat16 --text wikitext2_test.txt "
        "--window 512 --limit 6 --out qwen-1.5b",
        """One thread, while others used the machine.""",
    ),
)

TUNING = """
## Tuning towards the float model

`--tune` first tunes blocks, codes included, and then the whole model, whose codes stay
([Tuning](plans.md#tuning)). Sizes stay. "32 steps of the whole" is the second step alone
(`tune: {block_steps: 0, steps: 32, segments: 4}` in a plan). "34 thousand tokens" is `quick` with a
quarter of the text for blocks, which the whole was then tuned on, too. The untuned row is that of
the table above, which an earlier version made: 3.2988 bits where what was tuned has 3.2990.

```sh
quantine quantize demo out --bits-per-weight 3.3 --both-axes --calibration wikitext2_valid.txt \\
    --samples 32 --bfloat16 --tune quick
quantine eval out --reference demo --text wikitext2_test.txt,c4_en_validation_500.jsonl \\
    --window 1024 --limit 24 --json tuning-demo-3.3-quick.json
```

"""
TUNED = (
    ("3.3,both_axes=true", "32 steps of the whole", "tuning-demo-3.3-whole"),
    ("3.3,both_axes=true", "34 thousand tokens", "tuning-demo-3.3-less-text"),
    ("3.3,both_axes=true", "quick", "tuning-demo-3.3-quick"),
    ("3.3,both_axes=true", "quick, two texts, tokens by the loss", "tuning-demo-3.3-mixed"),
    ("3.3,both_axes=true", "quick, two texts, all by the loss", "tuning-demo-3.3-coupled"),
    ("3.3,both_axes=true", "long, the same, 128 segments", "tuning-demo-3.3-long"),
    ("3.3,both_axes=true", "quick, the same, half the rate", "tuning-demo-3.3-half-rate"),
    ("3.65,both_axes=true", "quick, two texts, all by the loss", "tuning-demo-3.65-coupled"),
    ("4.25,both_axes=true", "quick, two texts, tokens by the loss", "tuning-demo-4.25-mixed"),
    ("4.25,both_axes=true", "quick, all by the loss, 128 segments", "tuning-demo-4.25-coupled"),
    ("4.25,both_axes=true", "quick, the same, half the rate", "tuning-demo-4.25-half-rate"),
)
"""A row of `TUNED_FROM`, how it was tuned, and the scores of the result by `quantine eval`."""
TUNED_FROM = "budgets-demo"
"""The comparison with the models that were tuned, and that the table of tuning follows."""
PEERS = """
### What others reach

AutoRound 0.16.1, which tunes roundings by signed gradients (arXiv 2309.05516), leaves a KL
divergence of 0.2130 on the same windows of WikiText-2 (perplexity 24.42) and 0.3837 on those of C4
(51.47): 3 bits in groups of 64 with zero points, 3.297 bits, 200 iterations on 128 segments of 512
tokens, dequantized by its own library on an H200 GPU. Untuned, a budget of 3.3 bits is below
that, tuned at about half of it. GPTQ of llm-compressor and the types of llama.cpp have tables
below.

What a scalar grid does not reach are trellis codes after rotations, as in EXL3 (QTIP with LDLQ),
which quantine does not have. Published perplexities of Llama-3.2-1B-Instruct on WikiText-2, which
were read off a plot of the project and are good to 0.01 (float 14.22; other texts and contexts than
on this page):

| bits of the decoder | EXL3 | GPTQ in mixed widths (EXL2) | llama.cpp with importance matrix |
|---|---|---|---|
| 2.0 | 23.27 |  |  |
| 2.5 | 17.90 |  | IQ2_M, 2.68 bits: 23.14 |
| 3.0 | 15.42 | 21.38 | IQ3_XS, 3.27 bits: 17.16 |
| 3.5 | 14.87 | 16.53 | IQ3_M, 3.57 bits: 16.19 |
| 4.0 | 14.51 | 15.16 | IQ4_XS, 4.27 bits: 14.88 |

Where every bit counts, below 4, expect EXL3 to be the better one: its files take a GPU and its own
kernels. At 4 bits it is 2% above its float model there, a budget of 4.25 bits, untuned, 4% here.
"""
WEIGHTED = """
### Tokens that count by the loss

`--loss-weights` weighs each token in the Hessian of a matrix's input by how much the float model's
predictions depend on the matrix's outputs there. A budget of 3.3 bits on the demo model, untuned,
without and with it: KL divergence on 8 windows of 1024 tokens of each text.

```sh
quantine quantize demo OUT --bits-per-weight 3.3 --both-axes \\
    --calibration wikitext2_valid.txt --samples 32 --bfloat16 --loss-weights
```

"""
WEIGHTED_AFTER = """
A pass of gradients through the model, and a Hessian and a factor for each matrix instead of each
input, double the processor time. On single matrices the gain is larger than what a budget leaves of
it. With blocks 12 to 17 of 30 alone rounded by SpQR to 3 bits, the divergence fell from 0.0268 to
0.0171 on WikiText-2 and from 0.0429 to 0.0318 on C4 (4 windows of 512). Gradients of three drawn
tokens instead of one gave 0.0167 and 0.0307. With three, weights that q, k and v share, and gate
and up, gave 0.0179 and 0.0316; the plain mean squares instead of their roots 0.0174 and 0.0320,
clipped at 5 0.0171 and 0.0312; and Hessians for each of four groups of rows 0.0167 and 0.0307, no
better for twice the time. opt-mini at 2 bits (SpQR, groups of 32) fell from 0.0034 to 0.0031 and
from 0.0045 to 0.0043.

Since then the outputs of a matrix make up for each other's errors, too. The same budget out of the
text of two sources [above](#tuning-towards-the-float-model), in float32 on an EPYC with AVX2, on 24
windows of 1024 tokens; `--loss-weights` before that, and with it:

"""
COUPLED_AFTER = """
More text makes both steadier: the last row is of `--samples 128`, by `--bfloat16` on another
machine beside other programs.

By blocks 12 to 17 alone (4 windows of 512 of each text, tokens of the same two sources, weighted):
0.0192 on WikiText-2 and 0.0228 on C4 without, 0.0160 and 0.0193 where all outputs of a matrix make
up for each other, 0.0162 and 0.0202 in runs of at most 768, which are kept, 0.0167 and 0.0200 of
512, 0.0170 and 0.0210 of 256. Queries, keys and values alone gain 0.0018 and 0.0012 of that, the
other matrices 0.0013 and 0.0015. Second moments of the gradients as they are, where tokens with
large ones stand for all, gave 0.0174 and 0.0207, so tokens count by a root there, too. A damping of
0.3 of the mean diagonal is between 0.1 (0.0159, 0.0200) and 1 (0.0167, 0.0210). Where all tokens
count alike, the same windows give 0.0309 and 0.0388.
"""
TUNING_AFTER = """
On held-out segments of the calibration text the divergence fell from 0.1729 to 0.1520 by 32 steps
of the whole, and by `quick` to 0.1339 after blocks and 0.1313 at the end; 6.1% of codes changed.
With 34 thousand tokens it was 0.1380 after blocks and 0.1370 at the end, while it was 0.04 on the
text that was tuned on: more text is what helps. `quick` took 1058 s of processor time on one thread
of an Intel Xeon with AMX after solving, and 4.9 GB, while others used the machine; 32 steps of the
whole took 447 s with solving.

The next rows of 3.3 bits are of a text that takes turns between WikiText-2 and C4, solved with
`--loss-weights`. Where tokens alone count by the loss, an earlier version made them; in the others
outputs make up for each other, too ([below](#tokens-that-count-by-the-loss)):

```sh
python benchmarks/mixed_text.py wikitext2_valid.txt c4_en_train_1000.jsonl mixed.txt
quantine quantize demo out --bits-per-weight 3.3 --both-axes --calibration mixed.txt \\
    --samples 32 --loss-weights --tune quick
```

It agrees best with the float model over both texts: on C4 a quarter less is left than by `quick`
out of WikiText-2 alone, on WikiText-2, of which it saw half as much, 2% more. The part of the text
that judges went from 0.1996 to 0.1525 by tokens alone, and from 0.1749 to 0.1484 with outputs: of
the eighth that these take off before tuning, 3% are left after it. One thread of an EPYC with AVX2
took 60 to 67 minutes of processor time in float32, four fifths of it to tune, and 7 GB. By tokens
alone, 4.25 bits leave 22% less on WikiText-2 and 32% less on C4 than untuned; the part of the text
that judges went from 0.0527 to 0.0447 by blocks and 0.0445 at the end, while 0.03 was left on what
was tuned on. It took 60 minutes of the same.

Solving with 128 segments instead of 32 gains the most: a ninth of the divergence at 3.3 bits,
before anything is tuned. `long` then took the part that judges from 0.1643 to 0.1392 by blocks and
to 0.1339 at the end, in 55 minutes of processor time on one thread of an EPYC that multiplies in
bfloat16, while others used the machine. At 4.25 bits tuned blocks gained nothing over 128 segments,
0.0430 of 0.0431: noise moved 6% of the codes. Blocks 0 to 4 alone, tuned at that rate, added 1.2%
to it; at half the rate 2.8% of their codes change, and 2.1% is taken off; at a quarter 0.07% and
0.7%. So blocks move at half the rate since, as in the last rows of 3.3 and 4.25 bits; the others
are at the old one. At half the rate `quick` went from 0.1643 to 0.1376 by blocks and 0.1327 at the
end at 3.3 bits, and from 0.0431 to 0.0385 and 0.0385 at 4.25, in 28 and 29 minutes of the same.

At first, only blocks 0 to 3 of 30 were tuned in a trial, out of 34 thousand tokens of which half
were WikiText-2 and half the training part of C4. On 10 segments each of held-out WikiText-2 and C4
(512 tokens) the divergence fell from 0.1557 and 0.3558 to 0.1515 and 0.3389. Weighing the error by
the covariance of the loss's gradients in the block's output gave 0.1538 and 0.3388, so it stays
plain. Where codes began by a margin of 0.05 instead of 0.2, 14% of block 0's changed, and its error
became 2.7 times as large.

Moving codes of the whole model by its divergence was tried in one way, which did not pay. In each
of 32 steps of 2048 tokens those codes moved by one whose normalized gradients had the largest sums,
up to 1% of all in the last step. On 10 segments each of held-out WikiText-2 and C4 (512 tokens) the
divergence was 0.1763 and 0.3566 untuned, 0.1545 and 0.3282 by the 32 steps above, and 0.1822 and
0.3485 with 0.94% of the codes moved, on other segments of the same text. Half way, with 0.5%, it
was 0.1661 and 0.3311. A likely reason is how little text 65 thousand tokens are for 106 million
codes; a block's outputs say far more of its codes. So codes stay in the second step.
"""

AXES = """
## AdaDim: the axis that groups run along, fixed and chosen

AdaDim (tables 2 and 3): where groups run along outputs, within one input channel ("per-IC"), a loud
channel spoils only its own groups; where they run along inputs ("per-OC"), all it meets. Choosing
for each matrix is better than either. Groups of 64; perplexity of the demo model on 24 windows of
1024 tokens of WikiText-2 (float 21.008); RTN and GPTQ as published, with grids from smallest to
largest value. `spqr 3.2` has outliers up to 3.2 bits on average, so that all take as many bytes.
Matrices choose by the output of attention, of the MLP, or their own; or by what an axis changes in
the model's predictions, as under a budget that leaves the axis alone to be chosen.

```sh
python benchmarks/axes.py demo wikitext2_valid.txt wikitext2_test.txt --bfloat16 --json axes.json
```

"""
AXES_AFTER = """
GPTQ at 3 bits with a fixed axis was calibrated in float32 (without `--bfloat16`): in bfloat16 it
gives 38.01 and 34.07. Equal solvers differ by 2 to 3% at 3 bits, by chance.
"""
AXIS_NAMES = {
    "in": "along inputs",
    "out": "along outputs",
    "chosen": "chosen by outputs",
    "predicted": "by predictions",
}

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

EXPERTS = """
## Mixtures of experts: which text an expert is shown

A small mixture (qwen3_moe: 2 blocks, 128 wide, 8 experts, 2 chosen; trained for ten minutes on
bytes of WikiText-2, then 5% of the channels made 4 to 30 times as loud) at about 3.6 bits. KL
divergence from the float model, in nats per byte, on 32 windows of 128 bytes of the test text;
32 segments of 128 bytes to learn from, so that 6 of 48 matrices had fewer tokens than inputs.

```sh
python benchmarks/experts.py train MIXTURE wikitext2_train_raw_5k.txt --seconds 600
python benchmarks/experts.py measure MIXTURE wikitext2_train_raw_5k.txt wikitext2_test.txt \\
    --limit 32 --samples 32 --json experts.json
python benchmarks/experts.py speed --rounds 3 --json experts-speed.json
```

"""
EXPERTS_AFTER = """
Experts are shown the tokens that chose them, and the rarely chosen borrow the mean of the others:
with no method is another way better, though SpQR and the budget are within one standard error of
it with all tokens, which take four times the work here, and more with more experts. So there is
nothing to choose. The budget, which gives often chosen experts more bits, halves the divergence of
SpQR at the same size. Perplexities do not order the ways: the float model's is {reference:.2f},
with a standard error of 1.3.

A random mixture of 16 experts, 512 wide, at 4 bits takes {packed:.1f} MB when it is loaded, from
files of {file:.1f} MB, and {floats:.1f} MB decoded to float32. Generating through transformers it
makes {fast:.0f} tokens per second of processor time, and {slow:.0f} with the same experts decoded.
"""
ENGINES = """
## Engines

Perplexity of exported directories in the real engines and in quantine, on the same tokens of the
held-out text, by `benchmarks/engines.py`. Plans round to the nearest: what is compared is engines.
Weights are the same numbers; "here" is float32 with exact products, and so is the plug-in with
directories that ask for `exact`, as these do. vLLM's own kernels compute in 16 bits, and
llama.cpp rounds activations to 8 bits when it multiplies with blocks; "decoded" is the same file
after llama.cpp has made floats of it itself. "Transformers with the library" has no quantine: the
library compressed-tensors decodes the file. Of tiny models, the plug-in has plans with another
width and grid for every matrix, and the others 4 bits in groups of 32, symmetric but in GGUF. For
vLLM's own kernels, which want AVX-512, they have heads 32 wide, and bfloat16 where it refuses
float16. GPTQ files of families that the plug-in does not serve are read by quantine's own `import`:
these rows show that files say what the directory does, and no engine.
"""
ENGINE_TABLES = {
    "demo": "SmolLM2-135M",
    "qwen": "Qwen2.5-Coder-0.5B",
    "families": "Tiny random models of each family",
}
"""Files of `benchmarks/engines.py` (``engines-NAME.json``), and what the models are."""
THROUGHPUT = """
### vLLM: tokens per second

New tokens of all requests per second of processor time, after prompts of 4 tokens, in vLLM on the
CPU: the float model in bfloat16, and the same engine with packed matrices, by turns, by
`benchmarks/vllm_throughput.py`. Medians of the rounds; the ratio is taken within a round, with the
smallest and largest in brackets. One thread, while others worked on the machine, which costs
caches: of an Intel Xeon with AMX for SmolLM2, of an AMD EPYC with AVX-512 for Qwen2.5.

"""
THROUGHPUT_TABLES = {
    "demo": "SmolLM2-135M, 4.25 bits by rounding to nearest, table and head of 8 bits",
    "qwen": "Qwen2.5-Coder-0.5B, a budget of 4.25 bits (SpQR), table and head of 6 bits",
}
"""Files of `benchmarks/vllm_throughput.py` (``vllm-throughput-NAME.json``), and the models."""

LLAMA_CPP = """
### Solved in llama.cpp's types, against its own quantizer

Files of the same types at the same bytes, from the same float weights and the same calibration
text: of it, llama.cpp's quantizer gets the mean square of each input (its importance matrix).
Perplexity and KL divergence from the float model are quantine's, on held-out text, of either file
opened as floats; "served" are those of llama.cpp, which rounds activations to 8 bits.

```sh
QUANTINE_LLAMA_CPP_PYTHON=... python benchmarks/llama_cpp_types.py demo OUT.json \\
    --work DIR --windows 8
```
"""
LLAMA_CPP_TABLES: dict[str, str] = {
    "demo": """SmolLM2-135M. Rows of 576 inputs, six of seven matrices, are no whole blocks of the
types with a K: Q4_0, Q5_0, Q5_1 and Q8_0 stand in there.""",
    "qwen": """Qwen2.5-Coder-0.5B. Only the 4864 inputs of `down_proj` are whole blocks of the types
with a K; 896 inputs are not. The float weights are those of a Q4_K_M file of llama.cpp, so they
lie on the grids that Q4_K_M gives them once more: there perplexity is 0.002 above that of
llama.cpp's own file, with a lower KL, and 0.021 below where tokens count by the loss
(`--loss-weights`); in all other rows both are lower.""",
    "wide": """SmolLM2-135M made 768 wide, with 1536 inputs of `down_proj`: all rows are whole
blocks of the types with a K. What is added is zeros, and predictions stay what they are
(`python benchmarks/widened.py demo DIR`).""",
}
"""Files of `benchmarks/llama_cpp_types.py` (``llama-cpp-NAME.json``), and what the models are."""

LLM_COMPRESSOR = """
### GPTQ, against that of llm-compressor

The same grids, float weights and calibration text; both write `compressed-tensors` files, which are
imported here and scored by one evaluation. llm-compressor 0.14 orders by activation, with static
groups. Its norms are stored in 16 bit, ours in 32: 0.06% of a file of SmolLM2. Qwen2.5-Coder's
float weights are those of a Q4_K_M file.

```sh
QUANTINE_LLM_COMPRESSOR_PYTHON=... python benchmarks/against_llm_compressor.py demo OUT.json \\
    --work DIR
```

"""
LLM_COMPRESSOR_MODELS = {"demo": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
"""Models of `benchmarks/against_llm_compressor.py`, by what ``llm-compressor-NAME.json`` says."""

INTRODUCTION = """# Results

What the papers claim, measured again with quantine on the models at hand. This page is written by
[benchmarks/results.py](../benchmarks/results.py) from JSON; the command that made a table is above
it. Perplexities of small models on short texts are not those of the papers: read the order of rows
and the recovery, not the level.

What the models at hand cannot show: anything about models with billions of weights, whose outliers
SpQR, AdaDim and RPTQ are made for; and scores of tasks that small models only guess at.
"""


def page() -> str:
    """The page, from all comparisons."""
    parts = [INTRODUCTION]
    for table in TABLES:
        rows = _read(table.name)["rows"]
        parts.append(
            f"\n## {table.title}\n\n{table.claim}\n\n```sh\n{table.command}\n```\n\n"
            f"{markdown(rows)}\n{table.limits}\n"
        )
        if table.name == AXES_BEFORE:
            parts += [AXES, axes(), AXES_AFTER]
        if table.name == TUNED_FROM:
            parts += [TUNING, tuned(), TUNING_AFTER, PEERS]
            parts += [WEIGHTED, weighted("loss-weights-demo", "tokens count"), WEIGHTED_AFTER]
            parts += [weighted("loss-outputs-demo", "by the loss"), COUPLED_AFTER]
    parts += [EXPERTS, experts()]
    parts += [ACTIVATIONS, rounded(ROUNDED), COUNTED, contributions(), SCHEMES]
    for name, heading, remark in SCHEME_TABLES:
        parts.append(f"\n{heading}\n\n{schemes(name)}\n{remark}\n")
    parts += [MEMORY, memory(), ROTATION]
    for name, (heading, remark) in ROTATIONS.items():
        parts.append(f"\n{heading}\n\n{rotations(name)}\n{remark}\n")
    parts.append(ENGINES)
    parts += [f"\n### {shown}\n\n{engines(name)}" for name, shown in ENGINE_TABLES.items()]
    parts.append(LLAMA_CPP)
    parts += [f"\n{shown}\n\n{llama_cpp(name)}" for name, shown in LLAMA_CPP_TABLES.items()]
    parts += [LLM_COMPRESSOR, llm_compressor(), THROUGHPUT, throughput()]
    return "".join(parts)


def axes() -> str:
    """Perplexities by method and axis."""
    rows = {row["name"]: row for row in _read("axes-demo")}
    kinds = dict.fromkeys(name.rpartition(" ")[0] for name in rows)
    lines = _head(["", "bits per weight", *AXIS_NAMES.values(), "chose outputs"])
    for kind in kinds:
        found = [rows.get(f"{kind} {axis}") for axis in AXIS_NAMES]
        present = [row for row in found if row]
        bits = " / ".join(dict.fromkeys(f"{row['bits_per_weight']:.3f}" for row in present))
        values = [row and f"{row['perplexity']:.3f} ± {row['stderr']:.2f}" for row in found]
        chosen = [f"{row['along_outputs']} of {row['matrices']}" for row in found[2:] if row]
        lines.append(_line([kind, bits, *(value or "" for value in values), " / ".join(chosen)]))
    return "\n".join(lines) + "\n"


def tuned() -> str:
    """Perplexities and divergences of models before and after they were tuned."""
    before = {row["name"]: row for row in _read(TUNED_FROM)["rows"]}
    names = list(_read(TUNED[0][2])["texts"])
    columns = [f"{name} {score}" for name in names for score in ("perplexity", "KL")]
    lines = _head(["plan", "tuned", "bits per weight", *columns])
    for plan in dict.fromkeys(row[0] for row in TUNED):
        found = {"": before[plan]} | {how: _read(file) for of, how, file in TUNED if of == plan}
        for how, row in found.items():
            cells = [cell for name in names for cell in _tuned_cells(row["texts"][name])]
            lines.append(_line([plan, how, f"{row['bits_per_weight']:.3f}", *cells]))
    return "\n".join(lines) + "\n"


def weighted(file: str, kind: str) -> str:
    """Divergences without and with something that the loss is asked for, which ``kind`` calls."""
    rows = _read(file)
    texts = list(rows[0]["texts"])
    columns = [f"{name} {score}" for name in texts for score in ("perplexity", "KL")]
    lines = _head([kind, "bits per weight", *columns, "processor seconds"])
    for row in rows:
        cells = [cell for name in texts for cell in _tuned_cells(row["texts"][name])]
        bits, seconds = f"{row['bits_per_weight']:.3f}", f"{row['cpu_seconds']:.0f}"
        lines.append(_line([row["name"], bits, *cells, seconds]))
    return "\n".join(lines) + "\n"


def _tuned_cells(score: dict[str, Any]) -> list[str]:
    return [
        f"{score['perplexity']:.3f} ± {score['stderr']:.2f}",
        f"{score['kl']:.4f} ± {score['kl_stderr']:.4f}",
    ]


def experts() -> str:
    """Divergences by method and way of showing text, and the speed of a mixture."""
    rows, speed = _read("experts"), _read("experts-speed")
    ways = dict.fromkeys(row["shown"] for row in rows)
    lines = _head(["", "bits per weight", *ways])
    for plan in dict.fromkeys(row["plan"] for row in rows):
        found = {row["shown"]: row for row in rows if row["plan"] == plan}
        bits = " / ".join(dict.fromkeys(f"{row['bits']:.3f}" for row in found.values()))
        cells = [
            f"{found[way]['kl']:.4f} ± {found[way]['kl_stderr']:.4f}" if way in found else ""
            for way in ways
        ]
        lines.append(_line([plan, bits, *cells]))
    megabytes = {name: speed[f"{name}_bytes"] / 1e6 for name in ("packed", "file")}
    return (
        "\n".join(lines)
        + "\n"
        + EXPERTS_AFTER.format(
            reference=rows[0]["reference"],
            floats=speed["float_bytes"] / 1e6,
            fast=speed["packed"],
            slow=speed["floats"],
            **megabytes,
        )
    )


def schemes(name: str) -> str:
    """Perplexities, and divergences where they were measured, by variant and scheme."""
    rows = {row["scheme"]: row for row in _read(name)}
    reference = rows.pop("float")["texts"]
    split = {scheme: scheme.partition("-")[::2] for scheme in rows}
    present = dict.fromkeys(scheme for scheme, _ in split.values())
    names = [scheme for scheme in ORDER if scheme in present]
    lines = []
    for text, score in reference.items():
        lines += [f"{text}: float {score['perplexity']:.3f} ± {score['stderr']:.2f}", ""]
        lines += _head(["", *names])
        for suffix, label in VARIANTS.items():
            found = [rows.get(f"{scheme}-{suffix}".removesuffix("-")) for scheme in names]
            if any(found):
                lines.append(_line([label, *(_cell(row and row["texts"][text]) for row in found)]))
        lines.append("")
    return "\n".join(lines)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    kl = "" if score["kl"] is None else f" ({score['kl']:.4f})"
    return f"{score['perplexity']:.3f}{kl}"


def rotations(name: str) -> str:
    """Divergences by plan, without a rotation and with one."""
    rows = {row["name"]: row for row in _read(name)}
    texts = list(next(iter(rows.values()))["texts"])
    columns = [f"{text}: {how}" for text in texts for how in ("as it is", "rotated")]
    lines = _head(["", "bits per weight", *columns])
    for plan in dict.fromkeys(row.removeprefix(ROTATED) for row in rows):
        pair = [rows.get(plan), rows.get(f"{ROTATED}{plan}")]
        bits = next(f"{row['bits_per_weight']:.3f}" for row in pair if row)
        cells = [row and f"{row['texts'][text]['kl']:.4f}" for text in texts for row in pair]
        lines.append(_line([plan, bits, *(cell or "" for cell in cells)]))
    return "\n".join(lines) + "\n"


def memory() -> str:
    """Bytes of the models in the paper, by scheme."""
    found = {model: footprints(model, 64, 8192) for model in OPT}
    lines = _head(["scheme", *(f"{model}: weights + cache + temporary = all" for model in found)])
    for rows in zip(*found.values(), strict=True):
        cells = [
            f"{row.weights / GB:.1f} + {row.cache / GB:.1f} + {row.temporary / GB:.1f} = "
            f"**{row.total / GB:.0f}**"
            for row in rows
        ]
        lines.append(_line([rows[0].scheme, *cells]))
    large = {row.scheme: row for row in found["opt-66b"]}
    before, after = large["W4A16"], large["W4A4"]
    saved, cache = (before.total - after.total) / GB, (before.cache - after.cache) / GB
    return "\n".join(lines) + "\n" + MEMORY_AFTER.format(saved=saved, cache=cache)


def engines(name: str) -> str:
    """Perplexities of exports in other engines and in quantine."""
    lines = _head(["plan", "export", "engine", "windows", "there", "here", "difference"])
    refused = []
    for row in _read(f"engines-{name}"):
        to = row["to"] or "(own)"
        if "refused" in row:
            refused.append(f"Refused, {row['plan']} to {to}: {row['refused']}.\n")
            continue
        there, here = row["there"], row["here"]
        cells = [row["plan"], to, row["engine"], row["windows"], f"{there:.4f}", f"{here:.4f}"]
        lines.append(_line([*cells, f"{there / here - 1:+.4%}"]))
    return "\n".join(["\n".join(lines) + "\n", *dict.fromkeys(refused)])


def llama_cpp(name: str) -> str:
    """Files solved here and by llama.cpp's quantizer, side by side."""
    found = _read(f"llama-cpp-{name}")
    head = ["file", "by", "bytes", "perplexity", "KL", "same top word"]
    lines = _head([*head, "served: perplexity", "served: KL"])
    for row in found["rows"]:
        here, there = row["here"], row["there"]
        lines.append(
            _line(
                [
                    row["target"],
                    f"**{row['by']}**" if row["by"].startswith("quantine") else row["by"],
                    f"{row['file_bytes']:,}",
                    f"{here['perplexity']:.3f} ± {here['stderr']:.2f}",
                    f"{here['kl']:.4f} ± {here['kl_stderr']:.4f}",
                    f"{here['top1']:.1%}",
                    f"{there['perplexity']:.3f}",
                    f"{there['divergence']:.4f}",
                ]
            )
        )
    said = f"{found['windows']} windows of {found['window']} tokens; {found['samples']} segments"
    return "\n".join(lines) + f"\n\n{said} of calibration text. ± is one standard error.\n"


def llm_compressor() -> str:
    """GPTQ of both programs, side by side."""
    lines = _head(["model", "grid", "by", "bytes", "perplexity", "KL"])
    for name, model in LLM_COMPRESSOR_MODELS.items():
        found = _read(f"llm-compressor-{name}")
        for row in found["rows"]:
            by = f"**{row['by']}**" if row["by"] == "quantine" else row["by"]
            cells = [model, row["grid"], by, f"{row['bytes']:,}", *_tuned_cells(row["here"])]
            lines.append(_line(cells))
    said = f"{found['windows']} windows of {found['window']} tokens; {found['samples']} segments"
    return "\n".join(lines) + f"\n\n{said} of calibration text. ± is one standard error.\n"


def throughput() -> str:
    """Tokens per second in vLLM, packed against float, by number of requests."""
    lines = _head(["", "graphs", "requests", "rounds", "bfloat16", "packed", "ratio"])
    for name, shown in THROUGHPUT_TABLES.items():
        found = _read(f"vllm-throughput-{name}")
        graphs = "eager" if found["eager"] else "compiled"
        for requests in dict.fromkeys(row["requests"] for row in found["rows"]):
            floats, packed = (row["speeds"] for row in found["rows"] if row["requests"] == requests)
            ratios = [two / one for one, two in zip(floats, packed, strict=True)]
            medians = [f"{median(speeds):.1f}" for speeds in (floats, packed)]
            ratio = f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(_line([shown, graphs, str(requests), str(len(ratios)), *medians, ratio]))
    return "\n".join(lines) + "\n"


def _read(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|---" * len(cells) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rounded(name: str) -> str:
    """What rounding one site of activations does, by kind of grid."""
    found = _read(name)
    lines = _head(["", *found["sites"]])
    for name, changes in found["changes"].items():
        lines.append(_line([name, *(f"{value:.2e}" for value in changes)]))
    return "\n".join(lines) + "\n"


def contributions() -> str:
    """Divergences by reorder and kind of grid."""
    rows = _read(SITES)
    lines = _head(["", *next(iter(rows.values()))])
    for name, row in rows.items():
        lines.append(_line([name, *(f"{value:.4f}" for value in row.values())]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
