"""Bytes of the tensors that a run holds at once where it computes, from the configuration alone.

A run is a sequence of steps: the token table feeds the first block, blocks are run, observed and
solved, gradients are taken for a budget. What is computed on holds the largest step. Counted are
the tensors of the PyTorch references; programs for GPUs take no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from quantine.calibrate.backward import LOGITS
from quantine.calibrate.compensation import may_write
from quantine.calibrate.setup import TOKENS_PER_BATCH
from quantine.calibrate.shards import batch_samples
from quantine.calibrate.submodules import OUTPUT_TOKENS
from quantine.core.device import CPU
from quantine.families.layers import Layer
from quantine.kernels.fit.grid_cost import CHUNK
from quantine.kernels.fit.reference import SHRINKS
from quantine.plan.decision import Decision
from quantine.plan.scheme import SWEEPS
from quantine.rptq.kmeans import starts_of
from quantine.run.job import Job
from quantine.statistics.output_covariance import run_of

FLOAT: Final = 4
"""Bytes of a float32, the dtype of weights, hidden states and Hessians during a run."""
LIVE_TENSORS: Final = 4
"""Number of tensors as wide as the block's widest matrix that exist at once in a forward pass."""
ATTENDED_TENSORS: Final = 6
"""Number of tensors as wide as hidden states that exist at once while a block attends."""
STOPPED_TENSORS: Final = 4
"""Number of tensors as wide as hidden states that a block keeps beside its widest input when it
stops to be observed."""
ATTENDING_TENSORS: Final = 2
"""The same of a block that has not attended yet."""
SOLVED_COPIES: Final = 4.5
"""Number of copies of a matrix when it has been solved: codes, packed and decoded ones, and what
the error of its output is computed of."""
FACTORED_COPIES: Final = 2.6
"""Number of Hessians that exist at once while one is factored: the ordered copy becomes the factor,
with the products of its halves beside it."""
NARROWEST_HEAD: Final = 32
"""Channels of an attention head, at least, where a model's configuration does not say."""
SCORES: Final = 3.25
"""Number of tensors as large as the attention scores of a batch that exist at once where attention
is not fused: scores, their softmax, that with rows of zeros, and which these are."""
ROUNDED_SCORES: Final = 4
"""The same where attention rounds activations."""
GRADIENT_SCORES: Final = 5
"""The same while gradients are taken."""
GRADIENT_TENSORS: Final = 16
"""Number of tensors as wide as hidden states that exist at once while gradients are taken."""
GRADIENT_WIDEST: Final = 6
"""Number of tensors as wide as the block's widest matrix that exist at once then."""
COUPLED_COPIES: Final = 4
"""Bytes held for each of `coupling_bytes` while they are found: moments, results, those in float16,
and the factor of a matrix."""
REORDERED_COPIES: Final = 8
"""Number of tensors as large as what the outputs of a matrix ask of each other that exist at once
while it is put into another order."""
LOGIT_COPIES: Final = 6
"""Number of tensors as large as the logits that exist at once while gradients are taken."""
CANDIDATE_TENSORS: Final = 6
"""Number of tensors of candidate ranges, or made of them, that exist at once where the grids of a
whole matrix are fitted together."""
FITTED_COPIES: Final = 3
"""Number of copies of a matrix while grids are fitted to it."""
SEARCH_COPIES: Final = 5
"""Number of tensors that the search for clipped ranges makes of the weights it compares at once."""

CLUSTERED_TENSORS: Final = 8
"""Tensors with the distances of all channels from all centres that exist at once."""

Place = Literal["device", "memory", "disk"]
"""Where hidden states between two blocks are: where it is computed, in the memory of the CPU, or in
files. On the CPU the first two are one, called ``"device"``."""


@dataclass(frozen=True)
class Residence:
    """Where the hidden states of a run are, and how many go through a block at once.

    Attributes:
        hidden: where hidden states are between two blocks.
        resumes: whether a block that stops to be observed keeps what it computed until then,
            instead of computing it again.
        batch_tokens: see `quantine.calibrate.sequential.CalibrationSetup`.
        reads_ahead: whether a block is read while the one before is worked on.
    """

    hidden: Place = "device"
    resumes: bool = True
    batch_tokens: int = TOKENS_PER_BATCH
    reads_ahead: bool = True


def working_set(job: Job, residence: Residence) -> int:
    """Most bytes of tensors that are held at once on the device of ``job``.

    Args:
        job: the checked request.
        residence: where its hidden states are.
    """
    table = FLOAT * next(d.layer.weights for d in job.decisions if d.layer.role == "embedding")
    hidden = hidden_bytes(job) if residence.hidden == "device" else 0
    # Reading a tensor holds the file's and the copy; then the table feeds the first block.
    steps = [2 * table, table + hidden + _batch_bytes(job, residence)]
    steps.append(hidden + _in_block(job, residence))
    steps.append(hidden + FLOAT * block_weights(job) + _clustering(job))
    outside = [d for d in job.scheme_layers() if d.layer.role != "block"]
    steps.extend(_solving(decision, 0) for decision in outside)
    if job.plan.bits_per_weight is not None or job.plan.loss_weights:
        steps.extend(_probing(job, table, residence))
    return max(steps)


def hidden_bytes(job: Job) -> int:
    """Bytes of the hidden states between two blocks, of the float model, too, where it runs."""
    return (2 if job.plan.compensate else 1) * state_bytes(job)


def state_bytes(job: Job) -> int:
    """Bytes of the hidden states of one model."""
    return FLOAT * _tokens(job) * width(job)


def may_resume(job: Job) -> bool:
    """Whether blocks stop to be observed, and can go on there."""
    return job.segments is not None and job.plan.true_sequential and not job.plan.float_inputs


def stopped_bytes(job: Job) -> int:
    """Bytes that blocks keep when they stop to be observed, at most."""
    inside = [layer.in_features for layer in _largest_block(job)]
    return FLOAT * _tokens(job) * (
        STOPPED_TENSORS * width(job) + max(inside)
    ) + _rounded_scores_kept(job)


def width(job: Job) -> int:
    """Width of the hidden states between blocks."""
    return _largest_block(job)[0].in_features


def block_weights(job: Job) -> int:
    """Number of weights in the matrices of a block."""
    return sum(layer.weights for layer in _largest_block(job))


def _in_block(job: Job, residence: Residence) -> int:
    """Bytes held while one block is worked on, hidden states apart.

    They are its weights, what outputs ask of each other, and the largest of forward pass,
    factorization and solver.
    """
    inside = _largest_block(job)
    square, kept = _hessians(job, inside)
    stopped = stopped_bytes(job) if residence.resumes else 0
    steps = [
        *(
            _solving(decision, square) + _sweeping(job, decision) + stopped
            for decision in job.scheme_layers()
            if decision.layer.role == "block"
        ),
        int(FACTORED_COPIES * square) + stopped,
        square + _forward(job, inside, residence),
        _summing(job, square + kept) - kept,
        _comparing(job, inside, residence),
        _reordering(job),
        _compensating(job, inside, square, residence),
    ]
    return FLOAT * block_weights(job) + block_coupling_bytes(job) + kept + max(steps)


def _summing(job: Job, statistics: int) -> int:
    """Bytes of the ``statistics`` of all its shards that a rank holds, with those of others.

    The first rank, and one that is alone, adds them up as they come.
    """
    count = job.ranks.count
    held = 1 if count == 1 else -(-job.calibration.shards // count) + 1
    return held * statistics


def _hessians(job: Job, inside: list[Layer]) -> tuple[int, int]:
    """Bytes of the largest Hessian of a block, and of those that are held beside it.

    Those of experts that run side by side are held together, and else only where all are observed
    at once.
    """
    if job.segments is None:
        return 0, 0
    alone = job.plan.loss_weights  # each layer is observed by itself
    squares = {
        layer.name if alone else layer.group: FLOAT * layer.in_features**2 for layer in inside
    }
    # Of the last layer of each group.
    stages = {layer.name if alone else layer.group: layer.stage for layer in inside}
    held: dict[tuple[str, str], int] = {}
    for group, square in squares.items():
        held[stages[group]] = held.get(stages[group], 0) + square
    together = max(held.values()) if may_resume(job) else sum(held.values())
    largest = max(squares.values())
    return largest, together - largest


def _solving(decision: Decision, square: int) -> int:
    """Bytes held while a matrix is solved whose Hessian takes ``square`` bytes."""
    weights, candidates = decision.layer.weights, _candidates(decision)
    searched = SEARCH_COPIES * min(CHUNK, weights) + candidates // 3 if candidates else 0
    fitting = FITTED_COPIES * weights + max(candidates, searched)
    return FLOAT * max(fitting, int(SOLVED_COPIES * weights)) + 2 * square


def _sweeping(job: Job, decision: Decision) -> int:
    """Bytes of what outputs ask of each other that are held beside while codes are chosen again.

    They are ordered by runs, and held twice for a moment.
    """
    scheme, outputs = decision.scheme, decision.layer.out_features
    choices = decision.choices or (scheme,)
    sweeps = any(getattr(one.solver, SWEEPS, 0) for one in choices if one is not None)
    return 2 * FLOAT * outputs * run_of(outputs) if job.plan.loss_weights and sweeps else 0


def _reordering(job: Job) -> int:
    """Bytes held while what outputs ask of each other is put into the order of activations."""
    if job.plan.activations is None or not job.plan.loss_weights:
        return 0
    outputs = [layer.out_features for layer in _largest_block(job)]
    largest = max(count * run_of(count) for count in outputs)
    return block_coupling_bytes(job) + REORDERED_COPIES * FLOAT * largest


def _candidates(decision: Decision) -> int:
    """Numbers in the candidate ranges of a matrix whose grids are all fitted at once."""
    scheme, layer = decision.scheme, decision.layer
    assert scheme is not None
    found = [0]
    for choice in decision.choices or (scheme,):
        static = getattr(choice.solver, "groups", None) == "static"
        if static or (choice.spec.group_axis == "out" and choice.spec.second_level):
            lines, length = choice.spec.lines(layer.out_features, layer.in_features)
            # Clusters differ in size, so that they are fitted one after another.
            count = 1 if choice.spec.clustered else choice.spec.groups(length)
            found.append(CANDIDATE_TENSORS * len(SHRINKS) * lines * count)
    return max(found)


def _comparing(job: Job, inside: list[Layer], residence: Residence) -> int:
    """Bytes held while choices are compared by outputs of the block; 0 where none are.

    They are inputs of the parts of a block, their outputs before and after a change, and weights.
    """
    if not any(decision.objective == "output" for decision in job.decisions):
        return 0
    widths = {layer.group: layer.in_features for layer in inside}
    tokens, widest = min(_tokens(job), OUTPUT_TOKENS), max(one.out_features for one in inside)
    numbers = tokens * (sum(widths.values()) + 4 * widest) + block_weights(job)
    return FLOAT * numbers + _forward(job, inside, replace(residence, resumes=False))


def _compensating(job: Job, inside: list[Layer], square: int, residence: Residence) -> int:
    """Bytes held while a matrix makes up for errors before it; 0 where none does.

    They are its Hessian, moments of its inputs on text to learn of and to judge by, the same
    damped, their factor and a copy of it, the errors' with them, two changes and what judging one
    takes, and a batch that runs through the block.
    """
    if not job.plan.compensate:
        return 0
    writers = [layer for layer in inside if may_write(job.family, layer, width(job))]
    sums = [5 * layer.in_features**2 + 6 * layer.weights for layer in writers]
    return square + FLOAT * max(sums, default=0) + _forward(job, inside, residence)


def _clustering(job: Job) -> int:
    """Bytes held while channels of a block's inputs are partitioned into clusters, at most.

    Those of heads take less than a Hessian.
    """
    spec = job.plan.activations
    if spec is None or not spec.reorders:
        return 0
    channels = max(layer.in_features for layer in _largest_block(job))
    count = min(max(map(spec.clusters_of, ("R1", "R4", "R5"))), channels)
    return FLOAT * CLUSTERED_TENSORS * starts_of(channels, count) * count * channels


def _forward(job: Job, inside: list[Layer], residence: Residence) -> int:
    """Bytes held while a batch runs through a block, and what other batches keep meanwhile."""
    if job.segments is None:
        return 0
    rows, tokens = _batch_tokens(job, residence), _tokens(job) * residence.resumes
    widest = max(layer.out_features for layer in inside)
    attends = FLOAT * (rows * ATTENDED_TENSORS + tokens * ATTENDING_TENSORS) * width(job)
    attends += int(_scores(job) * _score_bytes(job, rows)) + rows * job.segment_length()
    attends += _rounded_scores_kept(job) if residence.resumes else 0
    stopped = stopped_bytes(job) if residence.resumes else 0
    multiplies = FLOAT * rows * LIVE_TENSORS * (widest + width(job)) + stopped
    return max(attends, multiplies)


def _scores(job: Job) -> float:
    """Number of tensors of attention scores that exist at once."""
    if job.plan.activations is not None:
        return ROUNDED_SCORES
    return 0 if job.device == CPU else SCORES  # PyTorch's attention on the CPU is always fused


def _score_bytes(job: Job, rows: int) -> int:
    """Bytes of the attention scores of ``rows`` tokens."""
    heads = getattr(job.config.get_text_config(), "num_attention_heads", None)
    # A configuration that does not call them so: as many as there are of the narrowest heads.
    heads = int(heads or width(job) // NARROWEST_HEAD)
    return FLOAT * heads * rows * job.segment_length()


def _rounded_scores_kept(job: Job) -> int:
    """Bytes of scores that stopped blocks keep: where they are rounded, attention returns them."""
    return 0 if job.plan.activations is None else _score_bytes(job, _tokens(job))


def _probing(job: Job, table: int, residence: Residence) -> list[int]:
    """Bytes held while gradients are taken, for which hidden states are on disk."""
    inside = _largest_block(job)
    rows, widest = _batch_tokens(job, residence), max(layer.out_features for layer in inside)
    logits = LOGIT_COPIES * FLOAT * max(min(LOGITS, rows * job.config.vocab_size), 1)
    backward = FLOAT * rows * (GRADIENT_TENSORS * width(job) + GRADIENT_WIDEST * widest)
    backward += GRADIENT_SCORES * _score_bytes(job, rows) if job.device != CPU else 0
    # Second moments of gradients of a block's outputs, and what is made of them.
    coupled = block_coupling_bytes(job)
    weights = FLOAT * block_weights(job)
    # Gradients start at the head, with its weights.
    return [2 * table + logits, weights + COUPLED_COPIES * coupled + backward]


def coupling_bytes(job: Job) -> list[int]:
    """Bytes in float32 of what outputs of the matrices of each block ask of each other."""
    if not job.plan.loss_weights:
        return []
    blocks: dict[int, int] = {}
    for decision in job.scheme_layers():
        block, outputs = decision.layer.block, decision.layer.out_features
        if block is not None:
            blocks[block] = blocks.get(block, 0) + FLOAT * outputs * run_of(outputs)
    return list(blocks.values())


def block_coupling_bytes(job: Job) -> int:
    """Bytes of `coupling_bytes` of the block that has most."""
    return max(coupling_bytes(job), default=0)


def _batch_bytes(job: Job, residence: Residence) -> int:
    return FLOAT * _batch_tokens(job, residence) * width(job)


def _batch_tokens(job: Job, residence: Residence) -> int:
    """Tokens that go through a block at once; 0 without calibration."""
    if job.segments is None:
        return 0
    samples, length = job.segments.shape
    shards = job.calibration.shards
    return batch_samples(samples, length, residence.batch_tokens, shards) * length


def _tokens(job: Job) -> int:
    return 0 if job.segments is None else job.segments.numel()


def _largest_block(job: Job) -> list[Layer]:
    """The layers of the block with most weights, in running order."""
    blocks: dict[int, list[Layer]] = {}
    for decision in job.decisions:
        if decision.layer.block is not None:
            blocks.setdefault(decision.layer.block, []).append(decision.layer)
    return max(blocks.values(), key=lambda layers: sum(layer.weights for layer in layers))
