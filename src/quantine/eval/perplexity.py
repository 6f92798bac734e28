"""Perplexity as GPTQ measures it, and closeness to a reference model.

The whole text is one token stream, cut into windows that do not overlap; the last, incomplete one
is dropped. Every window begins as the tokenizer begins a text, or, as in the papers, only the first
does. What the tokenizer puts there, or else a window's first token, is context only: with at most
one such token, a window of ``n`` tokens scores ``n - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from quantine.calibrate.bos import BOS_DEFAULT, Bos
from quantine.calibrate.text import read_text
from quantine.calibrate.token_stream import token_stream
from quantine.core.device import for_float64
from quantine.errors import CalibrationError, ending
from quantine.eval.interval import mean_with_error
from quantine.ranks.ranks import ALONE, Ranks
from quantine.source.model_source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_WINDOW: Final = 2048
"""Tokens per window where nothing else is asked for, as in the papers' tables."""
ROWS_AT_ONCE: Final = 256
"""Number of tokens whose logits are turned into float32 probabilities at once, to bound memory."""


@dataclass(frozen=True)
class Windows:
    """Windows of a text.

    Attributes:
        tokens: token ids ``[windows, window]`` int64 on the CPU.
        context: number of first tokens of each window that are not scored, at least 1.
    """

    tokens: Tensor
    context: int = 1


@dataclass(frozen=True)
class Prediction:
    """A model's prediction of each scored token of a window, with ``scored = window - context``.

    Attributes:
        logits: ``[scored, vocabulary]`` of any float dtype; a constant may have been added to each
            row.
        top: ``[scored]`` int64, the most likely tokens.
        loss: negative log-likelihood, in nats, of the tokens that really come next, summed.
    """

    logits: Tensor
    top: Tensor
    loss: float


@dataclass(frozen=True)
class Score:
    """The score of a model on one window of text, as sums over its scored tokens.

    Attributes:
        loss: negative log-likelihood in nats.
        kl: Kullback-Leibler divergence from the reference's predictions in nats; 0 without a
            reference.
        agree: number of positions where the most likely next token is the reference's; 0 without a
            reference.
        tokens: number of scored tokens.
        reference_loss: the reference's negative log-likelihood in nats; ``None`` without a
            reference.
    """

    loss: float
    kl: float
    agree: int
    tokens: int
    reference_loss: float | None = None


def window_length(window: int | None, longest_context: int | None) -> int:
    """Tokens per window for a model with a context of at most ``longest_context`` tokens.

    Args:
        window: what is asked for; ``None`` is `DEFAULT_WINDOW`, or the context if shorter.
        longest_context: ``None`` for a model without a limit.

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
    source: ModelSource,
    text: str,
    window: int,
    limit: int | None,
    vocabulary: int,
    bos: Bos = BOS_DEFAULT,
) -> Windows:
    """Tokenize the held-out part of a text and cut it into windows.

    Args:
        source: the model, whose tokenizer is used.
        text: a text, named as for `quantine.calibrate.text.read_text`.
        window: tokens per window.
        limit: largest number of windows; ``None`` keeps all.
        vocabulary: number of tokens that the model knows.
        bos: which windows begin as the tokenizer begins a text.

    Raises:
        CalibrationError: the text cannot be read or does not fill one window, a window has no room
            for text, the tokenizer belongs to another model, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise CalibrationError(f"the limit must be at least 1 window, not {limit}")
    tokenizer = source.tokenizer()
    words = read_text(text, "heldout", tokenizer)
    stream = token_stream(tokenizer, words, vocabulary, text, bos)
    step = stream.text_length(window)
    if step < 1:
        raise CalibrationError(
            f"a window of {window} tokens has no room for text, as the tokenizer begins it with "
            f"{len(stream.begin)}: use a larger window"
        )
    count = len(stream.tokens) // step
    if count == 0:
        raise CalibrationError(
            f"the text {ending(text)!r} has {len(stream.tokens)} tokens, fewer than one window of "
            f"{window}: use a longer text or a smaller window"
        )
    count = min(count, limit or count)
    return Windows(stream.pieces(range(0, count * step, step), window), max(1, len(stream.begin)))


@torch.no_grad()
def predict(model: PreTrainedModel, tokens: Tensor, context: int = 1) -> Prediction:
    """Run ``model`` on one window.

    The prediction's tensors are on the device of the model.

    Args:
        model: the model.
        tokens: token ids ``[window]`` int64.
        context: number of first tokens that are not scored, at least 1.
    """
    tokens = tokens.to(model.device)
    logits: Tensor = model(
        input_ids=tokens.unsqueeze(0), use_cache=False, output_attentions=False
    ).logits[0, context - 1 : -1]
    targets, loss = tokens[context:], 0.0
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p = logits[rows].float().log_softmax(-1)
        of_targets = log_p.gather(1, targets[rows].unsqueeze(1))
        loss -= float(for_float64(of_targets).sum(dtype=torch.float64))
    return Prediction(logits, logits.argmax(-1), loss)


def score_windows(
    model: PreTrainedModel,
    reference: Callable[[Tensor, int], Prediction] | None,
    windows: Windows,
    ranks: Ranks = ALONE,
) -> Iterator[Score]:
    """Score a model on windows of text, one after another as they are asked for.

    Args:
        model: the model.
        reference: gives the reference's prediction, on any device, for the token ids ``[window]``
            of a window and its `Windows.context`; ``None`` for no reference.
        windows: the windows.
        ranks: the processes that share the windows; each gets all scores.
    """

    def score(tokens: Tensor) -> Score:
        own = predict(model, tokens, windows.context)
        if reference is None:
            return Score(own.loss, 0.0, 0, len(own.top))
        other = reference(tokens, windows.context)
        agree = int((own.top == other.top.to(own.top.device)).sum())
        return Score(own.loss, divergence(own, other), agree, len(own.top), other.loss)

    return dealt(score, windows, ranks)


def dealt(score: Callable[[Tensor], Score], windows: Windows, ranks: Ranks) -> Iterator[Score]:
    """The scores of all windows in order, each computed by one of the ranks.

    Args:
        score: computes that of a window ``[window]``.
        windows: the windows.
        ranks: the processes that share them, as many windows at a time as there are ranks.
    """
    for together in windows.tokens.split(ranks.count):
        own = score(together[ranks.index]) if ranks.index < len(together) else None
        yield from (one for one in ranks.gather(own) if one is not None)


def divergence(model: Prediction, reference: Prediction) -> float:
    """Kullback-Leibler divergence of a model's prediction from the reference's, in nats.

    It is ``sum(r * (log r - log p))`` with the reference's probabilities ``r`` and the model's
    ``p``, summed over the tokens of the window, and computed on the device of ``model``.
    """
    kl, device = 0.0, model.logits.device
    for start in range(0, len(model.top), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p = model.logits[rows].float().log_softmax(-1)
        log_r = reference.logits[rows].to(device).float().log_softmax(-1)
        kl += float(for_float64(log_r.exp() * (log_r - log_p)).sum(dtype=torch.float64))
    return kl


def perplexity_of(scores: Sequence[Score]) -> tuple[float, float | None]:
    """Perplexity over all windows, and its standard error; see `perplexity_from`."""
    return perplexity_from([score.loss / score.tokens for score in scores])


def perplexity_from(losses: Sequence[float]) -> tuple[float, float | None]:
    """Perplexity and its standard error from the mean loss in nats of each window.

    The error is that of the mean loss over windows, carried through the exponential (delta method);
    ``None`` for a single window.
    """
    mean, error = mean_with_error(losses)
    perplexity = math.exp(mean) if mean < math.log(1e300) else math.inf
    return perplexity, None if error is None else perplexity * error
