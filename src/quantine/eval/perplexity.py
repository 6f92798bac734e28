"""Perplexity the GPTQ way, and closeness to a reference model.

The whole text is one token stream, cut into windows that do not overlap; the last, incomplete one
is dropped. A window's first token is context only, so a window of ``n`` tokens scores ``n - 1``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from quantine.calibrate.data import token_stream
from quantine.calibrate.text import BUILTIN, read_text
from quantine.errors import CalibrationError
from quantine.runtime.load import load_model
from quantine.runtime.modules import packed_modules
from quantine.runtime.source import ModelSource, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_WINDOW: Final = 2048
ROWS_AT_ONCE: Final = 256
"""Token rows whose logits are turned into float32 probabilities at once."""


@dataclass(frozen=True)
class Score:
    """What a window of text says about a model; sums over its scored tokens.

    Attributes:
        loss: negative log-likelihood in nats.
        kl: Kullback-Leibler divergence from the reference, in nats; 0 without one.
        agree: tokens whose most likely successor is the reference's; 0 without one.
        tokens: scored tokens.
    """

    loss: float
    kl: float
    agree: int
    tokens: int


def evaluate(
    model: str | Path,
    text: str = BUILTIN,
    *,
    window: int | None = None,
    limit: int | None = None,
    reference: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    on_window: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Measure a float or quantized model on a text.

    Args:
        model: anything `quantine.runtime.source.locate` finds.
        text: see `quantine.calibrate.text.read_text`; parts held out from calibration are used.
        window: tokens per window; default is 2048, or the model's longest context if shorter.
        limit: windows used at most.
        reference: a model to compare with, window by window; both are then in memory.
        dtype: of the computation.
        on_window: called with windows done, windows in all, and the perplexity so far.

    Returns:
        ``perplexity``, its standard error ``stderr`` (delta method over window means), ``tokens``
        scored, ``windows``, ``window``, ``bits_per_weight`` and ``model_bytes`` of the weight
        files, ``kl`` (mean nats per token) and ``top1`` (share of tokens), both ``None`` without a
        reference, and ``seconds`` of the forward passes.

    Raises:
        CalibrationError: the text is too short, or belongs to another tokenizer.
        CheckpointError, FormatError: a model cannot be read.
    """
    source = locate(model)
    config = source.config()
    window = window_length(window, getattr(config, "max_position_embeddings", None))
    windows = cut_windows(source, text, window, limit, config.vocab_size)
    tested = load_model(source, dtype)
    compared = None
    if reference is not None:
        compared_source = locate(reference)
        if compared_source.config().vocab_size != config.vocab_size:
            raise CalibrationError(f"{reference} and {model} have different vocabularies")
        compared = load_model(compared_source, dtype)
    started = time.perf_counter()
    scores = []
    for score in score_windows(tested, compared, windows):
        scores.append(score)
        if on_window is not None:
            on_window(len(scores), len(windows), perplexity_of(scores)[0])
    perplexity, stderr = perplexity_of(scores)
    tokens = sum(score.tokens for score in scores)
    return {
        "model": source.name,
        "text": text,
        "perplexity": perplexity,
        "stderr": stderr,
        "tokens": tokens,
        "windows": len(scores),
        "window": window,
        "dtype": str(dtype).removeprefix("torch."),
        "bits_per_weight": bits_per_weight(tested, source),
        "model_bytes": source.weight_bytes(),
        "reference": None if reference is None else str(reference),
        "kl": None if compared is None else sum(score.kl for score in scores) / tokens,
        "top1": None if compared is None else sum(score.agree for score in scores) / tokens,
        "seconds": time.perf_counter() - started,
    }


def window_length(window: int | None, longest_context: int | None) -> int:
    """Tokens per window for a model whose positions end at ``longest_context``.

    Raises:
        CalibrationError: ``window`` is below 2 or longer than the context.
    """
    if window is None:
        return min(DEFAULT_WINDOW, longest_context or DEFAULT_WINDOW)
    if window < 2:
        raise CalibrationError(f"a window needs at least 2 tokens, not {window}")
    if longest_context is not None and window > longest_context:
        raise CalibrationError(
            f"a window of {window} tokens exceeds the model's context of {longest_context}"
        )
    return window


def cut_windows(
    source: ModelSource, text: str, window: int, limit: int | None, vocabulary: int
) -> Tensor:
    """Token ids ``[windows, window]`` int64 of ``text``.

    Raises:
        CalibrationError: the text does not fill one window, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise CalibrationError(f"the limit must be at least 1 window, not {limit}")
    stream = token_stream(source.tokenizer(), read_text(text, "heldout"), vocabulary, text)
    count = len(stream) // window
    if count == 0:
        raise CalibrationError(
            f"the text {text!r} has {len(stream)} tokens, fewer than one window of {window}: use a "
            "longer text or a smaller window"
        )
    count = min(count, limit or count)
    return stream[: count * window].view(count, window)


def score_windows(
    model: PreTrainedModel, reference: PreTrainedModel | None, windows: Tensor
) -> Iterator[Score]:
    """Score ``windows`` ``[windows, window]`` one after another."""
    for tokens in windows:
        with torch.no_grad():
            logits = _logits(model, tokens)
            other = None if reference is None else _logits(reference, tokens)
            yield _score(logits, other, tokens[1:])


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, :-1]
    return logits


def _score(logits: Tensor, reference: Tensor | None, targets: Tensor) -> Score:
    loss, kl, agree = 0.0, 0.0, 0
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p = logits[rows].float().log_softmax(-1)
        loss -= float(log_p.gather(1, targets[rows].unsqueeze(1)).sum(dtype=torch.float64))
        if reference is not None:
            log_r = reference[rows].float().log_softmax(-1)
            kl += float((log_r.exp() * (log_r - log_p)).sum(dtype=torch.float64))
            agree += int((log_r.argmax(-1) == log_p.argmax(-1)).sum())
    return Score(loss, kl, agree, len(targets))


def perplexity_of(scores: list[Score]) -> tuple[float, float | None]:
    """Perplexity and its standard error, windows being the samples; ``None`` with just one."""
    means = [score.loss / score.tokens for score in scores]
    mean = sum(means) / len(means)
    perplexity = math.exp(mean) if mean < math.log(1e300) else math.inf
    if len(means) < 2:
        return perplexity, None
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return perplexity, perplexity * math.sqrt(variance / len(means))


def bits_per_weight(model: PreTrainedModel, source: ModelSource) -> float:
    """Packed bits per quantized weight; of a float model, stored bits per parameter."""
    packed = [module for _, module in packed_modules(model)]
    if not packed:
        return source.weight_bytes() * 8 / sum(p.numel() for p in model.parameters())
    nbytes = sum(t.nbytes for module in packed for t in module.packed_tensors().values())
    return nbytes * 8 / sum(module.out_features * module.in_features for module in packed)
