"""Mixtures of experts in docs/results.md."""

from __future__ import annotations

from results_tables import head, line, read

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


def experts() -> str:
    """Divergences by method and way of showing text, and the speed of a mixture."""
    rows, speed = read("experts"), read("experts-speed")
    ways = dict.fromkeys(row["shown"] for row in rows)
    lines = head(["", "bits per weight", *ways])
    for plan in dict.fromkeys(row["plan"] for row in rows):
        found = {row["shown"]: row for row in rows if row["plan"] == plan}
        bits = " / ".join(dict.fromkeys(f"{row['bits']:.3f}" for row in found.values()))
        cells = [
            f"{found[way]['kl']:.4f} ± {found[way]['kl_stderr']:.4f}" if way in found else ""
            for way in ways
        ]
        lines.append(line([plan, bits, *cells]))
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
