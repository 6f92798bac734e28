"""The tokens of one call of transformers' ``generate``, appended to all before them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quantine.runtime.decoder import Batch, most_likely


def append_each(
    chosen: Iterator[int], input_ids: Tensor, stopping_criteria: Any, streamer: Any
) -> Tensor:
    """``input_ids`` of one text, continued by ``chosen`` tokens until it is over."""
    for token in chosen:
        step = torch.tensor([token], dtype=torch.int64, device=input_ids.device)
        input_ids = torch.cat([input_ids, step.unsqueeze(1)], dim=1)
        streamer.put(step.cpu())
        if bool(stopping_criteria(input_ids, None).all()):
            break
    return input_ids


def append_chosen(
    batch: Batch,
    logits: Tensor,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    config: Any,
    streamer: Any,
) -> Tensor:
    """``input_ids`` of all texts, each continued by one token a step until all are over.

    Args:
        batch: has seen the prompts.
        logits: what it predicts after them, ``[texts, words]``.
        input_ids: prompts, ``[texts, tokens]``.
        logits_processor: of transformers; changes logits, given all tokens so far.
        stopping_criteria: those of transformers.
        config: that of the call.
        streamer: gets the tokens of each step.
    """
    # Without an end token, transformers goes on with all texts until all are over.
    dropping = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        step = _choose(logits_processor(input_ids, logits), config.do_sample)
        if dropping:
            step = torch.where(going, step, config._pad_token_tensor)
        input_ids = torch.cat([input_ids, step.unsqueeze(1)], dim=1)
        streamer.put(step.cpu())
        going = going & ~stopping_criteria(input_ids, None)
        if not bool(going.any()):
            return input_ids
        some = going.nonzero().flatten() if dropping else torch.arange(len(going), device="cpu")
        logits[some] = batch.step(some.tolist(), step[some])


def _choose(scores: Tensor, sample: bool) -> Tensor:
    if sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    chosen = [most_likely(row) for row in scores]
    return torch.tensor(chosen, dtype=torch.int64, device=scores.device)
