"""Predictions made before a run: bytes on disk, bits per weight, and peak memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quantine.budget.probe import probe_segments
from quantine.calibrate.backward import LOGITS
from quantine.calibrate.sequential import batch_samples
from quantine.calibrate.submodules import OUTPUT_TOKENS
from quantine.core.memory_limit import memory_limit
from quantine.core.process_memory import peak_memory
from quantine.core.spec import FLOAT16
from quantine.errors import PlanError
from quantine.families.layers import Layer, block_list
from quantine.kernels.fit.grid_cost import CHUNK
from quantine.run.job import Job

FLOAT: Final = 4
"""Bytes of a float32, the dtype of weights, hidden states and Hessians during a run."""
DEFAULT_SHARE: Final = 0.25
"""Share of the memory that the process may use which calibration activations take by default."""
GGUF_COPIES: Final = 1.5
"""Number of float32 copies of the model in memory while transformers dequantizes a GGUF file (1.3
measured)."""
LIVE_TENSORS: Final = 4
"""Number of tensors as wide as the block's widest matrix that exist at once in a forward pass."""
STOPPED_TENSORS: Final = 4
"""Number of tensors as wide as hidden states that a block keeps beside its widest input when it
stops to be observed."""
SOLVED_COPIES: Final = 5
"""Number of copies of a matrix while it is solved: weight, columns, errors, codes, decoded
weight."""
SCORES: Final = 4
"""Number of tensors as large as the attention scores of a batch that exist at once where attention
rounds activations."""
LOGIT_COPIES: Final = 6
"""Number of tensors as large as the logits that exist at once while gradients are taken."""
SEARCH_BYTES: Final = 32 * CHUNK
"""Bytes of temporary memory that the search for clipped ranges takes."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take in memory and on disk; all sizes in bytes.

    Attributes:
        packed: size of the packed matrices.
        kept: size of everything else in the output's weight files.
        weights: number of quantized weights.
        activations: size of the hidden states between two blocks.
        spills: whether hidden states go to disk, because they exceed the memory they may take.
        resumes: whether a block that stops to be observed keeps what it computed until then,
            instead of computing it again.
        peak_memory: largest resident memory of the process, without what its allocator keeps of
            freed memory.
        disk_while_running: most disk space used during the run, the finished output included.
        tokens: number of calibration tokens.
    """

    packed: int
    kept: int
    weights: int
    activations: int
    spills: bool
    resumes: bool
    peak_memory: int
    disk_while_running: int
    tokens: int

    @property
    def bits_per_weight(self) -> float:
        """Packed bits per quantized weight; 16 if nothing is quantized."""
        return self.packed * 8 / self.weights if self.weights else float(FLOAT16)

    @property
    def output(self) -> int:
        """Size of the output's weight files in bytes, without their headers."""
        return self.packed + self.kept


def estimate(job: Job, max_ram: float | None = None) -> Estimate:
    """Predict what a run will take.

    Args:
        job: the checked request.
        max_ram: GB (1e9 bytes) that calibration activations may take in memory, see
            `quantine.run.quantize.quantize`.

    Raises:
        PlanError: ``max_ram`` is negative, or not a number.
    """
    if max_ram is not None and not max_ram >= 0:
        raise PlanError(f"max_ram must not be negative, not {max_ram} GB")
    packed = sum(job.packed_bytes(decision) for decision in job.scheme_layers())
    kept = _kept_bytes(job)
    weights = sum(d.layer.weights for d in job.scheme_layers())
    tokens = 0 if job.segments is None else job.segments.numel()
    activations = tokens * _width(job) * FLOAT
    stopped = tokens * _stopped_width(job) * FLOAT
    limit = memory_limit() * DEFAULT_SHARE if max_ram is None else max_ram * 1e9
    spills = activations > limit
    resumes = job.plan.true_sequential and activations + stopped <= limit
    scratch = activations if spills else 0
    if job.source.gguf_file is not None:
        scratch += sum(p.numel() for p in job.model.parameters()) * FLOAT
        if len(job.source.gguf_parts) > 1:
            scratch += job.source.weight_bytes()  # all parts joined
    if job.plan.bits_per_weight is not None:
        blocks = len(block_list(job.model, job.family))
        length = job.segment_length()
        samples = 0 if job.segments is None else len(job.segments)
        scratch += blocks * probe_segments(samples, length) * length * _width(job) * FLOAT
    return Estimate(
        packed,
        kept,
        weights,
        activations,
        spills,
        resumes,
        _peak(job, 0 if spills else activations, stopped if resumes else 0),
        2 * (packed + kept) + scratch,
        tokens,
    )


def _kept_bytes(job: Job) -> int:
    """Bytes of the tensors that are not quantized: matrices in 16 bit, other tensors in float32."""
    state = job.model.state_dict()
    blocks = range(len(block_list(job.model, job.family)))
    names = [*job.loose_names(), *(n for index in blocks for n in job.block_names(index))]
    return sum(state[name].numel() * (2 if state[name].ndim >= 2 else FLOAT) for name in names)


def _peak(job: Job, activations: int, stopped: int) -> int:
    """Peak resident memory in bytes: that of this process so far plus that of the largest step.

    Args:
        job: the checked request.
        activations: bytes of hidden states in memory.
        stopped: bytes that stopped blocks keep.
    """
    table = FLOAT * next(d.layer.weights for d in job.decisions if d.layer.role == "embedding")
    # Reading a tensor holds the mapped file and the copy; then the table feeds the first block.
    steps = [2 * table, table + activations, _in_block(job) + activations + stopped]
    outside = [d.layer.weights for d in job.scheme_layers() if d.layer.role != "block"]
    steps.extend(SOLVED_COPIES * FLOAT * weights for weights in outside)
    if job.plan.bits_per_weight is not None:
        # Gradients start at the head: its weights, and some logits a few times over.
        steps.append(2 * table + LOGIT_COPIES * FLOAT * max(LOGITS, job.config.vocab_size))
    if job.source.gguf_file is not None:
        parameters = sum(p.numel() for p in job.model.parameters())
        steps.append(int(parameters * FLOAT * GGUF_COPIES))
    return peak_memory() + max(steps)


def _in_block(job: Job) -> int:
    """Bytes in memory while one block is worked on, hidden states apart.

    They are its weights, and the largest of forward pass, factorization and solver.
    """
    inside = _largest_block(job)
    squares = {layer.group: FLOAT * layer.in_features**2 for layer in inside}
    largest = FLOAT * max(layer.weights for layer in inside)
    square = max(squares.values())
    one_by_one = job.plan.true_sequential and not job.plan.float_inputs
    kept = 0 if one_by_one else sum(squares.values()) - square
    solving = SOLVED_COPIES * largest + 2 * square + SEARCH_BYTES
    factoring = 4 * square
    forward = square
    widest = max(layer.out_features for layer in inside)
    if job.segments is not None:
        rows = batch_samples(*job.segments.shape) * job.segments.shape[1]
        forward += FLOAT * rows * LIVE_TENSORS * (widest + _width(job))
        if job.plan.activations is not None:
            heads = int(job.config.num_attention_heads)
            forward += FLOAT * SCORES * heads * rows * job.segment_length()
    if any(decision.objective == "output" for decision in job.decisions):
        # Inputs of the parts of a block, and their outputs before and after a change.
        widths = {layer.group: layer.in_features for layer in inside}
        forward += FLOAT * OUTPUT_TOKENS * (sum(widths.values()) + 4 * widest)
    weights = FLOAT * sum(layer.weights for layer in inside)
    return weights + kept + max(solving, factoring, forward)


def _width(job: Job) -> int:
    """Width of the hidden states between blocks."""
    return _largest_block(job)[0].in_features


def _stopped_width(job: Job) -> int:
    """Number of floats per token that a block keeps when it stops to be observed."""
    inside = [layer.in_features for layer in _largest_block(job)]
    return STOPPED_TENSORS * _width(job) + max(inside)


def _largest_block(job: Job) -> list[Layer]:
    """The layers of the block with most weights, in running order."""
    blocks: dict[int, list[Layer]] = {}
    for decision in job.decisions:
        if decision.layer.block is not None:
            blocks.setdefault(decision.layer.block, []).append(decision.layer)
    return max(blocks.values(), key=lambda layers: sum(layer.weights for layer in layers))
