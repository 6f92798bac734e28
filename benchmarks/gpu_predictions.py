"""What quantizing on a GPU costs by arithmetic: operations and bytes of each stage, and seconds.

    python benchmarks/gpu_predictions.py

prints the tables that benchmarks/gpu_page.py writes into docs/gpu.md. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gpu_plans
from gpu_quantizing import EIGHT_BILLION, Shape
from quantine import Plan
from quantine.kernels.fit.reference import SHRINKS
from quantine.kernels.gram.reference import PANEL
from quantine.methods.spqr import SpQR
from quantine.run.estimate import estimate
from quantine.run.residence import DEVICE_SHARE

TOKENS = 128 * 2048
"""Tokens of calibration, as in the papers."""
BATCH = 2048
"""Tokens that go through a block at once."""
BLOCKS = 32
"""Blocks of the model of 8 billion weights."""
PRODUCTS = 0.6
"""Share of the peak that products of matrices in float32 are counted with."""
ELSEWHERE = 0.25
"""The same of element by element arithmetic in registers: few warps, and divisions."""
BANDWIDTH = 0.7
"""Share of the memory's bandwidth."""
OF_COLUMN = 1500
"""Cycles from a column to the next: two divisions, loads of a row of the factor, feedback."""
OF_CANDIDATE = 600
"""Cycles of trying one range, or one pair of codes, for a group of 16: 16 errors and divisions."""
OF_WEIGHT = 10
"""Operations that a candidate takes for each weight."""
OUTLIERS = 3
"""Ranges that tell which weights are likely outliers."""
NEIGHBOURS = 9
"""Pairs of codes of scale and zero point that are tried."""


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: float32 outside of tensor cores, 16 bits in them, memory, clock.

    ``memory`` is in GB, ``bandwidth`` in bytes a second.
    """

    name: str
    operations: float
    tensor: float
    bandwidth: float
    clock: float
    memory: float


CARDS = (
    Card("A100", 19.5e12, 312e12, 2.04e12, 1.41e9, 80),
    Card("H100", 66.9e12, 989e12, 3.35e12, 1.83e9, 80),
    Card("RTX 4090", 82.6e12, 165e12, 1.01e12, 2.52e9, 24),
)


@dataclass(frozen=True)
class Stage:
    """Operations, bytes of memory, steps that wait for each other; of what kind, and where.

    ``cards`` are names of those that have it, ``None`` where all do.
    """

    name: str
    operations: float
    bytes: float
    cycles: float = 0.0
    share: float = PRODUCTS
    in_tensor_cores: bool = False
    cards: tuple[str, ...] | None = None

    def seconds(self, card: Card) -> float:
        """The longest of the three; 0 where the card does not have it."""
        if self.cards is not None and card.name not in self.cards:
            return 0.0
        peak = card.tensor if self.in_tensor_cores else card.operations
        return max(
            self.operations / (self.share * peak),
            self.bytes / (BANDWIDTH * card.bandwidth),
            self.cycles / card.clock,
        )


def hessian(inputs: int, bits: int) -> Stage:
    """Panels right of the diagonal, batch after batch, and their mirror images.

    Inputs of ``bits`` 16 go to tensor cores.
    """
    batches = TOKENS // BATCH
    operations = TOKENS * inputs * (inputs + PANEL)
    read = batches * (BATCH * inputs * bits / 8) * (inputs / PANEL) / 2
    moved = read + batches * 5 * inputs**2 * 4
    return Stage("Hessian product", operations, moved, in_tensor_cores=bits == 16)


def factor(inputs: int) -> Stage:
    """Halving: four products of half the size for each matrix, 4/3 n**3 in all."""
    return Stage("Cholesky factor", 4 / 3 * inputs**3, 12 * inputs**2 * 4)


def feedback(outputs: int, inputs: int) -> Stage:
    """The products that correct the columns behind each block."""
    blocks = inputs / SpQR().block_size
    moved = outputs * inputs * 4 * blocks + inputs**2 / 2 * 4
    return Stage("feedback to columns behind", outputs * inputs**2, moved)


def loop(outputs: int, inputs: int) -> Stage:
    """Rounding, outlier tests and feedback within blocks, without fits."""
    weights = outputs * inputs
    operations = weights * (SpQR().block_size + 30)
    moved = weights * (4 + 4 + 4 + 1 + 1)
    return Stage("loop within blocks", operations, moved, inputs * OF_COLUMN, ELSEWHERE)


def fits(outputs: int, inputs: int) -> Stage:
    """Ranges of groups, likely outliers and second-level statistics."""
    candidates = len(SHRINKS) + OUTLIERS + NEIGHBOURS
    group = SpQR.default_spec.group_size
    return Stage(
        "fits of groups",
        outputs * inputs * candidates * OF_WEIGHT,
        outputs * inputs / group * 10,
        inputs / group * candidates * OF_CANDIDATE,
        ELSEWHERE,
    )


def forward(shape: Shape, bits: int) -> Stage:
    """One block on all tokens, once: what was computed is kept between its matrices."""
    weights = block_weights(shape)
    attention = 2 * TOKENS * BATCH * shape.hidden  # half of all pairs of tokens
    moved = TOKENS * bits / 8 * (12 * shape.hidden + 4 * shape.inner)
    operations = 2 * TOKENS * weights + attention
    return Stage("forward", operations, moved, in_tensor_cores=bits == 16)


def again(shape: Shape, bits: int) -> Stage:
    """What is computed again of a block where memory does not hold what it had until it stopped.

    It starts anew for each of the four inputs, and once more for its output.
    """
    of = {name: outputs * inputs for name, (outputs, inputs) in shape.matrices().items()}
    until_o = of["query"] + 2 * of["key"]
    until_gate = until_o + of["query"]
    weights = until_o + until_gate + until_gate + 2 * of["gate"]
    attention = 2 * TOKENS * BATCH * shape.hidden
    moved = TOKENS * bits / 8 * (3 * 10 * shape.hidden + 2 * shape.inner)
    return Stage(
        "parts of the forward again",
        2 * TOKENS * weights + 3 * attention,
        moved,
        in_tensor_cores=bits == 16,
        cards=tuple(card.name for card in CARDS if not keeps(shape, card)),
    )


def keeps(shape: Shape, card: Card) -> bool:
    """Whether `quantine plan` keeps what a block computed until it stops, in the card's memory."""
    segments = TOKENS // BATCH, BATCH
    model = gpu_plans.Shape(
        "model", BLOCKS, shape.hidden, shape.inner, shape.heads, shape.key_heads
    )
    job = gpu_plans.job_of(model, Plan.preset("spqr", bits=4), segments)
    return estimate(job, max_vram=DEVICE_SHARE * card.memory).residence.resumes


def block_weights(shape: Shape) -> int:
    return sum(outputs * inputs for outputs, inputs in all_matrices(shape))


def all_matrices(shape: Shape) -> list[tuple[int, int]]:
    """Outputs and inputs of the seven matrices of a block."""
    of = shape.matrices()
    return [of["query"], of["key"], of["key"], of["query"], of["gate"], of["gate"], of["down"]]


def of_matrix(outputs: int, inputs: int, bits: int) -> list[Stage]:
    return [
        hessian(inputs, bits),
        factor(inputs),
        feedback(outputs, inputs),
        loop(outputs, inputs),
        fits(outputs, inputs),
    ]


def of_model(shape: Shape, blocks: int, bits: int) -> list[Stage]:
    """Stages of a whole model; four inputs of a block have a Hessian each."""
    inputs = [shape.hidden, shape.hidden, shape.hidden, shape.inner]
    parts: list[list[Stage]] = [
        [forward(shape, bits)],
        [again(shape, bits)],
        [hessian(n, bits) for n in inputs],
        [factor(n) for n in inputs],
    ]
    each: list[Callable[[int, int], Stage]] = [feedback, loop, fits]
    parts += [[stage(*matrix) for matrix in all_matrices(shape)] for stage in each]
    return [_sum(part, blocks) for part in parts]


def _sum(stages: list[Stage], times: int) -> Stage:
    first = stages[0]
    return Stage(
        first.name,
        times * sum(stage.operations for stage in stages),
        times * sum(stage.bytes for stage in stages),
        times * sum(stage.cycles for stage in stages),
        first.share,
        first.in_tensor_cores,
        first.cards,
    )


def table(stages: list[Stage]) -> str:
    """A table in Markdown: a row for each stage, and their sum."""
    names = " | ".join(f"{card.name}, s" for card in CARDS)
    rows = [
        f"| stage | 1e12 operations | GB moved | {names} |",
        "|---|---|---|" + "---|" * len(CARDS),
    ]
    for stage in stages:
        if stage.cards == ():
            continue
        seconds = " | ".join(_short(stage.seconds(card)) for card in CARDS)
        operations, moved = _short(stage.operations / 1e12), _short(stage.bytes / 1e9)
        rows.append(f"| {stage.name} | {operations} | {moved} | {seconds} |")
    sums = (_short(sum(stage.seconds(card) for stage in stages)) for card in CARDS)
    rows.append(f"| sum | | | {' | '.join(sums)} |")
    return "\n".join(rows)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def page() -> str:
    """A matrix and a model, where blocks are computed in float32, and in bfloat16."""
    outputs, inputs = EIGHT_BILLION.matrices()["down"]
    parts = []
    for bits, computed in ((32, "float32"), (16, "bfloat16")):
        parts += [
            f"A matrix of {outputs} outputs and {inputs} inputs, blocks computed in {computed}:",
            table(of_matrix(outputs, inputs, bits)),
            f"A model of {BLOCKS} blocks of that shape, 8 billion weights; reading and writing "
            "files is not in it:",
            table(of_model(EIGHT_BILLION, BLOCKS, bits)),
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
