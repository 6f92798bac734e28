"""What tuning will take, predicted before a run: bytes of memory, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from quantine.core.device import is_here
from quantine.families.heads import Heads
from quantine.families.layers import block_list
from quantine.run.job import Job
from quantine.run.working_set import FLOAT, block_weights, width
from quantine.tuning.blocks import block_segments
from quantine.tuning.tune import JUDGED, segments_at_once

SAVED_TENSORS: Final = 8
"""Number of float32 tensors as wide as hidden states that a block keeps for its gradients."""
SAVED_WIDEST: Final = 4
"""Number of those as wide as the block's widest matrix."""
SAVED_SCORES: Final = 6
"""Number of those as large as the scores of attention, where activations are rounded."""
SAVED_INPUTS: Final = 2
"""Number of those as wide as the inputs of a matrix, for every matrix, where these are rounded."""
LOGIT_TENSORS: Final = 3
"""Number of tensors as large as the logits that exist at once: two models', and their gradient."""
DECODED_COPIES: Final = 6
"""Number of float32 copies of a matrix while gradients pass its decoding."""
PRODUCTS: Final = 4
"""Products with every matrix for a token that is tuned on: the float model's, the quantized one's,
and two for gradients. A token that judges takes two."""
STREAM_TENSORS: Final = 4
"""Number of tensors of hidden states while a block is tuned: both models', and next ones."""
CODE_TENSORS: Final = 6
"""Number of float32 tensors that are as large as a block whose codes are tuned."""
BLOCK_PRODUCTS: Final = 3
"""Products with every matrix for a token that a block is tuned on. To go on takes two."""
CODE_PASSES: Final = 120
"""How often each weight of a block is read and multiplied in a step, for codes and decoding."""
FORWARD_PASSES: Final = 8
"""How often, as it were, each number that blocks keep is read and multiplied to go forward."""
GRADIENT_PASSES: Final = 32
"""The same to go forward and, for gradients, back."""
LOGIT_PASSES: Final = 32
"""The same for each token's logits of both models, which are compared."""
BLOCK_CALLS: Final = 1000
"""What a batch that a block is given, forward and back, costs in calls of PyTorch, in units of the
least that a call takes; they decide where models are small."""
MATRIX_CALLS: Final = 500
"""The same for a step of the numbers of one matrix."""
TIMED_CALLS: Final = 200
"""Number of calls that are timed together."""
TIMED_TOKENS: Final = 512
"""Number of rows of the products that are timed."""
TIMES: Final = 5
"""How often they are timed; the fastest counts."""


def tuning_bytes(job: Job) -> int:
    """Most bytes of tensors that are held at once while the model of ``job`` is tuned.

    Both models, gradients of the matrices, codes, and what a batch of tokens leaves behind, or what
    the tuning of a block takes; 0 if the model is not tuned.
    """
    if job.tuning_text is None:
        return 0
    product = _dtype(job).itemsize
    everything = sum(p.numel() for p in job.model.parameters())
    quantized = [d.layer.weights for d in job.scheme_layers()]
    packed = sum(job.packed_bytes(decision) for decision in job.scheme_layers())
    # The float model, its quantized copy with gradients, a byte for each code, and what files hold.
    models = FLOAT * everything + (2 * product + 1) * sum(quantized) + packed
    length = job.tuning_text.whole.shape[1]
    tokens = gradient_segments(job) * length
    logits = LOGIT_TENSORS * product * tokens * _vocabulary(job)
    batch = FLOAT * tokens * (_kept(job) + _scores(job)) + logits
    decoded = FLOAT * DECODED_COPIES * max(quantized)
    return models + max(batch, decoded, _block_bytes(job) + decoded)


def gradient_segments(job: Job) -> int:
    """Number of segments whose gradients of the whole model are computed at once."""
    assert job.tuning_text is not None
    length = job.tuning_text.whole.shape[1]
    return segments_at_once(length, job.plan.activations is not None)


def _scores(job: Job) -> int:
    """Numbers of attention that the blocks keep of a token for gradients, where these are rounded.

    Elsewhere attention keeps none of its scores.
    """
    if job.plan.activations is None:
        return 0
    assert job.tuning_text is not None
    heads = Heads.of(job.config, job.family).queries
    blocks = len(block_list(job.model, job.family))
    return blocks * SAVED_SCORES * heads * job.tuning_text.whole.shape[1]


def _block_bytes(job: Job) -> int:
    """Most bytes that are held while blocks are tuned, models and decoded copies apart."""
    tokens = _block_tokens(job)
    if not tokens:
        return 0
    hidden = STREAM_TENSORS * tokens * width(job)
    return FLOAT * (hidden + CODE_TENSORS * block_weights(job))


def tuning_seconds(job: Job) -> float | None:
    """Seconds that tuning will take, within a factor of two or so.

    They follow from the time of a product and of a pass over memory, which are measured here and
    now, so that other work of the machine counts. ``None`` if the model is not tuned, or its device
    is not here.
    """
    if job.tuning_text is None or job.plan.tune is None or not is_here(job.device):
        return None
    weights = sum(d.layer.weights for d in job.decisions if d.layer.role != "embedding")
    tuned = job.tuning_text.whole.numel()
    judged = job.tuning_text.judges.numel() * _judgements(job)
    product, visit = _seconds_of_product(job), _seconds_of_pass(job)
    products = PRODUCTS * tuned + 2 * judged
    passes = (_kept(job) + _scores(job)) * (
        (FORWARD_PASSES + GRADIENT_PASSES) * tuned + 2 * FORWARD_PASSES * judged
    ) + LOGIT_PASSES * _vocabulary(job) * (tuned + judged)
    whole = products * weights * product + passes * visit
    return whole + _block_seconds(job, product, visit) + _calls(job) * _seconds_of_call(job)


def _calls(job: Job) -> int:
    """Number of calls of PyTorch while the model is tuned, which small models mostly wait for."""
    tuning, text = job.plan.tune, job.tuning_text
    assert tuning is not None
    assert text is not None
    blocks = len(block_list(job.model, job.family))
    matrices = sum(d.layer.role == "block" for d in job.decisions)
    batches = tuning.block_steps * tuning.segments  # of each block
    batches += -(-len(text.whole) // gradient_segments(job))
    batches += len(text.judges) * _judgements(job)
    steps = tuning.block_steps + tuning.steps
    return BLOCK_CALLS * blocks * batches + MATRIX_CALLS * matrices * steps


def _block_seconds(job: Job, product: float, visit: float) -> float:
    """Seconds for all blocks, with those that one product and one pass take for a number."""
    tuning, text = job.plan.tune, job.tuning_text
    assert tuning is not None
    assert text is not None
    weights = sum(d.layer.weights for d in job.decisions if d.layer.role == "block")
    stepped = tuning.block_steps * tuning.segments * text.whole.shape[1]
    products = BLOCK_PRODUCTS * stepped + 2 * _block_tokens(job)
    passes = (_kept(job) + _scores(job)) * (
        GRADIENT_PASSES * stepped + 2 * FORWARD_PASSES * _block_tokens(job)
    )
    codes = CODE_PASSES * tuning.block_steps * weights
    return products * weights * product + (passes + codes) * visit


def _block_tokens(job: Job) -> int:
    """Number of tokens that pass through the blocks while these are tuned; 0 if they are not."""
    assert job.tuning_text is not None
    return block_segments(job.tuning_text).numel()


def _judgements(job: Job) -> int:
    """How many times the whole model is judged."""
    assert job.plan.tune is not None
    return 1 + JUDGED + bool(job.plan.tune.block_steps)


def _kept(job: Job) -> int:
    """Numbers that the blocks of the model keep of a token for gradients."""
    inside = [d.layer for d in job.decisions if d.layer.role == "block"]
    widest = max(max(layer.in_features, layer.out_features) for layer in inside)
    blocks = len(block_list(job.model, job.family))
    inputs = sum(layer.in_features for layer in inside)
    rounded = 0 if job.plan.activations is None else SAVED_INPUTS * inputs
    return blocks * (SAVED_TENSORS * width(job) + SAVED_WIDEST * widest) + rounded


def _vocabulary(job: Job) -> int:
    return int(job.config.get_text_config().vocab_size)


def _dtype(job: Job) -> torch.dtype:
    return torch.bfloat16 if job.calibration.bfloat16 else torch.float32


def _seconds_of_product(job: Job) -> float:
    """Seconds that one weight takes for one token."""
    layer = next(d.layer for d in job.decisions if d.layer.role == "block")
    dtype, device = _dtype(job), job.device
    rows = torch.ones(TIMED_TOKENS, layer.in_features, dtype=dtype, device=device)
    weight = torch.ones(layer.out_features, layer.in_features, dtype=dtype, device=device)
    return _fastest(lambda: rows @ weight.T) / (TIMED_TOKENS * layer.weights)


def _seconds_of_pass(job: Job) -> float:
    """Seconds to read a number, multiply it and write it."""
    numbers = torch.ones(TIMED_TOKENS, 16 * width(job), dtype=torch.float32, device=job.device)
    return _fastest(lambda: numbers.mul_(1.0)) / numbers.numel()


def _seconds_of_call(job: Job) -> float:
    """Seconds of a call of PyTorch that has next to nothing to do."""
    one = torch.ones(1, dtype=torch.float32, device=job.device)

    def work() -> Tensor:
        for _ in range(TIMED_CALLS):
            one.mul_(1.0)
        return one

    return _fastest(work) / TIMED_CALLS


def _fastest(work: Callable[[], Tensor]) -> float:
    """Seconds of ``work``, the fastest of `TIMES`."""
    found = []
    for _ in range(TIMES):
        started = time.perf_counter()
        work().flatten()[0].item()  # which waits for the device
        found.append(time.perf_counter() - started)
    return min(found)
