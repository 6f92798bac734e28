"""Perplexity the GPTQ way, and closeness to a reference model.

The whole text is one token stream, cut into windows that do not overlap; the last, incomplete one
is dropped. A window's first token is context only, so a window of ``n`` tokens scores ``n - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from quantine.calibrate.segments import token_stream
from quantine.calibrate.text import read_text
from quantine.errors import CalibrationError
from quantine.eval.interval import mean_with_error
from quantine.source.locate import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_WINDOW: Final = 2048
ROWS_AT_ONCE: Final = 256
"""Token rows whose logits are turned into float32 probabilities at once."""


@dataclass(frozen=True)
class Prediction:
    """What a model expects after each token of a window but the last.

    Attributes:
        logits: ``[window - 1, vocabulary]`` floats, up to a constant in each row.
        top: ``[window - 1]`` int64, the most likely successors.
        loss: negative log-likelihood of the successors that came, summed, in nats.
    """

    logits: Tensor
    top: Tensor
    loss: float


@dataclass(frozen=True)
class Score:
    """What a window of text says about a model; sums over its scored tokens.

    Attributes:
        loss: negative log-likelihood in nats.
        kl: Kullback-Leibler divergence from the reference, in nats; 0 without one.
        agree: tokens whose most likely successor is the reference's; 0 without one.
        tokens: scored tokens.
        reference_loss: the reference's negative log-likelihood in nats; ``None`` without one.
    """

    loss: float
    kl: float
    agree: int
    tokens: int
    reference_loss: float | None = None


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


@torch.no_grad()
def predict(model: PreTrainedModel, tokens: Tensor) -> Prediction:
    """What ``model`` expects after each of ``tokens`` ``[window]`` int64 but the last.

    Tensors of the result are where the model is.
    """
    tokens = tokens.to(model.device)
    logits: Tensor = model(
        input_ids=tokens.unsqueeze(0), use_cache=False, output_attentions=False
    ).logits[0, :-1]
    targets, loss = tokens[1:], 0.0
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p = logits[rows].float().log_softmax(-1)
        loss -= float(log_p.gather(1, targets[rows].unsqueeze(1)).sum(dtype=torch.float64))
    return Prediction(logits, logits.argmax(-1), loss)


def score_windows(
    model: PreTrainedModel, reference: Callable[[Tensor], Prediction] | None, windows: Tensor
) -> Iterator[Score]:
    """Score ``windows`` ``[windows, window]`` one after another.

    Args:
        reference: gives a window's prediction to compare with, on any device.
    """
    for tokens in windows:
        own = predict(model, tokens)
        if reference is None:
            yield Score(own.loss, 0.0, 0, len(own.top))
            continue
        other = reference(tokens)
        agree = int((own.top == other.top.to(own.top.device)).sum())
        yield Score(own.loss, divergence(own, other), agree, len(own.top), other.loss)


def divergence(model: Prediction, reference: Prediction) -> float:
    """Kullback-Leibler divergence of ``model`` from ``reference``, summed over rows, in nats.

    Computed where the prediction of ``model`` is.
    """
    kl, device = 0.0, model.logits.device
    for start in range(0, len(model.top), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p = model.logits[rows].float().log_softmax(-1)
        log_r = reference.logits[rows].to(device).float().log_softmax(-1)
        kl += float((log_r.exp() * (log_r - log_p)).sum(dtype=torch.float64))
    return kl


def perplexity_of(scores: Sequence[Score]) -> tuple[float, float | None]:
    """Perplexity and its standard error, windows being the samples; ``None`` with just one."""
    return perplexity_from([score.loss / score.tokens for score in scores])


def perplexity_from(losses: Sequence[float]) -> tuple[float, float | None]:
    """Perplexity and its standard error from the mean loss in nats of each window.

    The error is that of the mean loss, carried through the exponential (delta method).
    """
    mean, error = mean_with_error(losses)
    perplexity = math.exp(mean) if mean < math.log(1e300) else math.inf
    return perplexity, None if error is None else perplexity * error
