"""Everything `quantine eval` measures of one model, in one dictionary."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantine.calibrate.text import BUILTIN
from quantine.core.device import device_named
from quantine.errors import CalibrationError
from quantine.eval.interval import mean_with_error, perplexity_recovery
from quantine.eval.perplexity import (
    Score,
    cut_windows,
    perplexity_from,
    perplexity_of,
    score_windows,
    window_length,
)
from quantine.eval.predictions import Predictions
from quantine.eval.tasks import TaskRequest, Tasks, TaskScore, compare_tasks
from quantine.runtime.load import load_model
from quantine.runtime.modules import packed_modules
from quantine.source.locate import ModelSource, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnWindow = Callable[[str, int, int, float], None]
"""Called with a text's name, windows done, windows in all, and the perplexity so far."""


def evaluate(
    model: str | Path,
    texts: str | Sequence[str] = BUILTIN,
    *,
    window: int | None = None,
    limit: int | None = None,
    reference: str | Path | None = None,
    cache: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    tasks: TaskRequest | None = None,
    on_window: OnWindow = lambda *_: None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Measure a float or quantized model.

    Args:
        model: anything `quantine.runtime.source.locate` finds.
        texts: one or several, see `quantine.calibrate.text.read_text`; parts held out from
            calibration are used. The model is loaded once for all.
        window: tokens per window; default is 2048, or the model's longest context if shorter.
        limit: windows of each text used at most.
        reference: a model to compare with, window by window.
        cache: directory in which the reference's predictions are kept, so that it runs once for
            many models; see `quantine.eval.predictions`. Without one both are in memory.
        dtype: of the computation.
        tasks: questions to ask, after the texts.
        device: of the computation, by PyTorch's name.

    Returns:
        ``model``, ``dtype``, ``reference``, ``bits_per_weight`` and ``model_bytes`` of the weight
        files; ``tasks`` by name, see `quantine.eval.tasks.compare_tasks`; and ``texts`` by the
        name of a text (of a file, without its directory):

        * ``perplexity``, its standard error ``stderr`` (delta method over window means),
          ``tokens`` scored, ``windows``, ``window``, ``digest`` of the scored tokens, ``seconds``;
        * with a reference, else ``None``: ``kl`` (mean nats per token) and ``top1`` (share of
          tokens) with standard errors ``kl_stderr`` and ``top1_stderr``,
          ``reference_perplexity``, and ``recovery``, the reference's perplexity over the model's,
          with the 95% confidence interval from ``recovery_low`` to ``recovery_high``.

    Raises:
        BackendUnavailable: there is no such device.
        CalibrationError: a text is too short, given twice, or belongs to another tokenizer.
        CheckpointError, FormatError: a model cannot be read.
        OutputError: predictions cannot be kept.
        PlanError: a task does not exist, cannot be run, or runs code without leave to do so.
    """
    where = device_named(device)
    asked = None if tasks is None else Tasks(tasks)
    source = locate(model)
    cut = cut_texts(source, texts, window, limit)
    compared = None
    if reference is not None:
        compared = reference_of(source, reference, dtype, cache, where)
        compared.reserve(cut.values())
    tested = load_model(source, dtype, where)
    return {
        "model": source.name,
        "dtype": str(dtype).removeprefix("torch."),
        "reference": None if reference is None else str(reference),
        "bits_per_weight": bits_per_weight(tested, source),
        "model_bytes": source.weight_bytes(),
        "texts": {
            name: summary(name, score_windows(tested, compared, windows), windows, on_window)
            for name, windows in cut.items()
        },
        "tasks": {} if asked is None else measure_tasks(tested, source, compared, asked),
    }


def cut_texts(
    source: ModelSource, texts: str | Sequence[str], window: int | None, limit: int | None
) -> dict[str, Tensor]:
    """Windows ``[windows, window]`` int64 of each text, by its own name or that of its file.

    Raises:
        CalibrationError: see `evaluate`.
    """
    config = source.config()
    window = window_length(window, getattr(config, "max_position_embeddings", None))
    cut: dict[str, Tensor] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        name = Path(text).name
        if name in cut:
            raise CalibrationError(f"two texts are called {name!r}: leave out or rename one")
        cut[name] = cut_windows(source, text, window, limit, config.vocab_size)
    return cut


def reference_of(
    source: ModelSource,
    reference: str | Path,
    dtype: torch.dtype,
    cache: str | Path | None,
    device: str | torch.device = "cpu",
) -> Predictions:
    """What ``source`` is compared with.

    Raises:
        CalibrationError: the vocabularies differ.
    """
    compared = locate(reference)
    if compared.config().vocab_size != source.config().vocab_size:
        raise CalibrationError(f"{reference} and {source.name} have different vocabularies")
    return Predictions(compared, dtype, None if cache is None else Path(cache), device)


def summary(
    name: str, scored: Iterable[Score], windows: Tensor, on_window: OnWindow
) -> dict[str, Any]:
    """What `evaluate` says of the text ``name``.

    Args:
        scored: a score for each of ``windows`` ``[windows, window]``.
    """
    started = time.perf_counter()
    scores: list[Score] = []
    for score in scored:
        scores.append(score)
        on_window(name, len(scores), len(windows), perplexity_of(scores)[0])
    perplexity, stderr = perplexity_of(scores)
    return {
        "perplexity": perplexity,
        "stderr": stderr,
        "tokens": sum(score.tokens for score in scores),
        "windows": len(scores),
        "window": windows.shape[1],
        "digest": digest_of(windows),
        **_closeness(scores),
        "seconds": time.perf_counter() - started,
    }


def digest_of(windows: Tensor) -> str:
    """Hash of the tokens ``windows``."""
    return hashlib.blake2b(windows.numpy().tobytes(), digest_size=16).hexdigest()


def measure_tasks(
    model: PreTrainedModel, source: ModelSource, reference: Predictions | None, tasks: Tasks
) -> dict[str, Any]:
    """The ``tasks`` of `evaluate`."""
    other = None if reference is None else reference_answers(reference, tasks)
    return compare_tasks(tasks.run(model, source.tokenizer()), other)


def reference_answers(reference: Predictions, tasks: Tasks) -> dict[str, TaskScore]:
    """The task scores of a reference, which are remembered."""
    kept = f"tasks-{tasks.request.identity()}"
    plain = reference.recall(kept)
    if plain is None:
        answered = tasks.run(reference.model, reference.source.tokenizer())
        plain = {name: asdict(score) for name, score in answered.items()}
        reference.remember(kept, plain)
    return {name: TaskScore(**values) for name, values in plain.items()}


def _closeness(scores: list[Score]) -> dict[str, float | None]:
    """How near the model is to its reference; every value ``None`` without one."""
    other = [s.reference_loss / s.tokens for s in scores if s.reference_loss is not None]
    if not other:
        names = ("kl", "kl_stderr", "top1", "top1_stderr", "reference_perplexity")
        return dict.fromkeys([*names, "recovery", "recovery_low", "recovery_high"])
    own = [score.loss / score.tokens for score in scores]
    kl, kl_stderr = mean_with_error([score.kl / score.tokens for score in scores])
    top1, top1_stderr = mean_with_error([score.agree / score.tokens for score in scores])
    recovery = perplexity_recovery(own, other)
    return {
        "kl": kl,
        "kl_stderr": kl_stderr,
        "top1": top1,
        "top1_stderr": top1_stderr,
        "reference_perplexity": perplexity_from(other)[0],
        "recovery": recovery.value,
        "recovery_low": recovery.low,
        "recovery_high": recovery.high,
    }


def bits_per_weight(model: PreTrainedModel, source: ModelSource) -> float:
    """Packed bits per quantized weight; of a float model, stored bits per parameter."""
    packed = [module for _, module in packed_modules(model)]
    if not packed:
        return source.weight_bytes() * 8 / sum(p.numel() for p in model.parameters())
    nbytes = sum(t.nbytes for module in packed for t in module.packed_tensors().values())
    return nbytes * 8 / sum(module.out_features * module.in_features for module in packed)
