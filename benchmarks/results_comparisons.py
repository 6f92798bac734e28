"""Comparisons of plans in docs/results.md: methods, sizes, axes, budgets."""

from __future__ import annotations

from dataclasses import dataclass

from quantine.comparison.table import markdown
from results_grids import OTHER_GRIDS
from results_tables import closeness, head, line, read


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

Of the 164 prompts of HumanEval, 20% (± 3%) are continued with the very 32 tokens of the float
model, each the likeliest, at the 4.25 bits with both axes and errors by the loss that are told of
[above](#tokens-that-count-by-the-loss); 13.6 tokens are the same before the first that
differs (`python benchmarks/continuations.py qwen2.5-coder-0.5b.gguf OUT --prompts
humaneval_test.jsonl`). At 3.65 bits, compensated, as [below](#errors-by-the-loss-compensated), they
are 16% (± 3%) and 11.0. Of the first 40, the rows above have 28% and 14.7 at 4.25 bits, 20% and
11.1 at 3.65. Peers were not run.""",
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
QWEN = "qwen"
"""The comparison that the table of models by the loss follows."""
BY_LOSS = """
### Errors by the loss, compensated

The same model out of text that takes turns between WikiText-2 and C4, with groups along both axes,
`--loss-weights` and where so said `--compensate`, untuned: 16 windows of 1024 tokens of WikiText-2
(float 26.331). Out of 16 thousand tokens of WikiText-2 and without any of that, KL is 0.0382 at
3.65 bits, 0.0161 at 4.25, 0.0315 with W4A8 and 0.0669 with W4A4KV, on the same windows.

```sh
python benchmarks/mixed_text.py wikitext2_valid.txt c4_en_train_1000.jsonl mixed.txt
quantine quantize qwen2.5-coder-0.5b.gguf out --scheme W4A4KV-rotated-mixed-centred \\
    --bits-per-weight 4.57 --both-axes --calibration mixed.txt --samples 64 --loss-weights \\
    --compensate --bfloat16
quantine eval out --reference qwen2.5-coder-0.5b.gguf --text wikitext2_test.txt --window 1024 \\
    --limit 16 --json out.json
```

"""
BY_LOSS_ROWS = (
    ("3.0", "64, compensated", "budget-qwen-3.0"),
    ("3.65", "64, compensated", "budget-qwen-3.65"),
    ("3.65", f"64, compensated, {OTHER_GRIDS}", "grids-qwen-3.65"),
    ("4.25 (a)", "128", "loss-weights-qwen-4.25"),
    ("4.25", f"64, compensated, {OTHER_GRIDS}", "grids-qwen-4.25"),
    ("4.57, W4A8", "64", "budget-qwen-W4A8-4.57"),
    (
        "4.57, W4A4KV-rotated-mixed-centred",
        "64, compensated",
        "budget-qwen-W4A4KV-4.57",
    ),
    ("W16A4KV-rotated-mixed", "32", "kv-qwen-rotated-mixed"),
    ("W16A4KV-rotated-mixed-centred", "16", "kv-qwen-rotated-mixed-centred"),
)
"""A budget or scheme, its segments, and scores by `quantine eval`."""
BY_LOSS_AFTER = """
(a) Before codes were [chosen once more](#codes-that-are-chosen-once-more).

What keys and values cost fell to a quarter by [centres of
keys](activations.md#keys-less-a-centre-that-turns). Before they were built, with keys alone in 4
bits, static grids, all else in floats, 2 windows and the first token exact: 0.035 with bits shared
out, 0.033 less their mean before rotary embeddings for all tokens, 0.010 with a centre of its own
for the first one. Values alone, rotated with factors, cost 0.007.
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


def axes() -> str:
    """Perplexities by method and axis."""
    rows = {row["name"]: row for row in read("axes-demo")}
    kinds = dict.fromkeys(name.rpartition(" ")[0] for name in rows)
    lines = head(["", "bits per weight", *AXIS_NAMES.values(), "chose outputs"])
    for kind in kinds:
        found = [rows.get(f"{kind} {axis}") for axis in AXIS_NAMES]
        present = [row for row in found if row]
        bits = " / ".join(dict.fromkeys(f"{row['bits_per_weight']:.3f}" for row in present))
        values = [row and f"{row['perplexity']:.3f} ± {row['stderr']:.2f}" for row in found]
        chosen = [f"{row['along_outputs']} of {row['matrices']}" for row in found[2:] if row]
        lines.append(line([kind, bits, *(value or "" for value in values), " / ".join(chosen)]))
    return "\n".join(lines) + "\n"


def by_loss() -> str:
    """Scores of Qwen2.5-Coder-0.5B with errors that count by the loss."""
    lines = head(["bits or scheme", "segments", "bits per weight", "perplexity", "KL"])
    for name, segments, file in BY_LOSS_ROWS:
        row = read(file)
        (score,) = row["texts"].values()
        bits = f"{row['bits_per_weight']:.3f}"
        lines.append(line([name, segments, bits, *closeness(score)]))
    return "\n".join(lines) + "\n"


def section(table: Table) -> str:
    """A comparison under its heading, with the command that made it."""
    rows = markdown(read(table.name)["rows"])
    return (
        f"\n## {table.title}\n\n{table.claim}\n\n```sh\n{table.command}\n```\n\n"
        f"{rows}\n{table.limits}\n"
    )
