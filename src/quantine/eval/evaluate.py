"""Everything that `quantine eval` measures of one model, as one dictionary."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantine.calibrate.bos import BOS_DEFAULT, Bos
from quantine.calibrate.text import BUILTIN, text_name
from quantine.calibrate.token_stream import begun
from quantine.core.ambient import own_state
from quantine.core.device import device_named
from quantine.errors import CalibrationError
from quantine.eval.interval import mean_with_error, perplexity_recovery
from quantine.eval.perplexity import (
    Score,
    Windows,
    cut_windows,
    perplexity_from,
    perplexity_of,
    score_windows,
    window_length,
)
from quantine.eval.predictions import Predictions
from quantine.eval.tasks import TaskRequest, Tasks, TaskScore, compare_tasks
from quantine.ranks.ranks import ALONE, Ranks
from quantine.runtime.load import load_model
from quantine.runtime.packed import packed_modules
from quantine.source.locate import locate
from quantine.source.model_source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnWindow = Callable[[str, int, int, float], None]
"""A function that is told of progress: name of the text, number of windows done, number of windows
in all, and the perplexity so far."""


@own_state()
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
    bos: Bos = BOS_DEFAULT,
    on_window: OnWindow = lambda *_: None,
    device: str | torch.device = "cpu",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Measure a float or quantized model.

    Args:
        model: a model, named as for `quantine.source.locate.locate`.
        texts: one or several texts, named as for `quantine.calibrate.text.read_text`, whose
            held-out parts are used. The model is loaded once for all.
        window: tokens per window; ``None`` is 2048, or the model's longest context if shorter.
        limit: largest number of windows of each text; ``None`` uses all.
        reference: a model to compare with, window by window, named like ``model``.
        cache: directory in which the reference's predictions are kept, so that it runs once for
            many models; see `quantine.eval.predictions`. Without one both models are in memory.
        dtype: dtype of activations and of weights that are not quantized.
        tasks: tasks to run after the texts.
        bos: which windows begin as the tokenizer begins a text: ``"each"``, as prompts do in use,
            or only the ``"first"`` of a text, as in the papers' tables, where no question of a task
            does either.
        on_window: called after each window.
        device: device of the computation, by PyTorch's name.
        ranks: the processes that share the windows, from `quantine.ranks.start.started`. All call
            this with the same arguments, devices apart, and get the same numbers; each holds the
            models.

    Returns:
        The names ``model``, ``dtype`` and ``reference``; ``bos``, or ``"none"`` if the tokenizer
        begins texts with nothing; ``bits_per_weight``, and ``model_bytes``, the size of the weight
        files; ``tasks`` by name, see `quantine.eval.tasks.compare_tasks`; and ``texts`` by the name
        of a text (of a file, without its directory):

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
    begins = begun(source.tokenizer(), bos)
    cut = cut_texts(source, texts, window, limit, bos)
    ranks.agree(
        lambda: {
            "model": source.file_digests(),
            "texts": text_digests(cut),
            "tasks": None if asked is None else asked.request.identity(),
        }
    )
    compared = None
    if reference is not None:
        compared = reference_of(source, reference, dtype, cache, where)
        compared.reserve(cut.values())
    tested = load_model(source, dtype, where)
    return {
        "model": source.name,
        "dtype": str(dtype).removeprefix("torch."),
        "reference": None if reference is None else str(reference),
        "bos": begins,
        "bits_per_weight": bits_per_weight(tested, source),
        "model_bytes": source.weight_bytes(),
        "texts": {
            name: summary(name, score_windows(tested, compared, windows, ranks), windows, on_window)
            for name, windows in cut.items()
        },
        "tasks": {}
        if asked is None
        else measure_tasks(tested, source, compared, asked, bos, ranks),
    }


def cut_texts(
    source: ModelSource,
    texts: str | Sequence[str],
    window: int | None,
    limit: int | None,
    bos: Bos = BOS_DEFAULT,
) -> dict[str, Windows]:
    """Tokenize texts and cut them into windows.

    Arguments are those of `evaluate`.

    Returns:
        The windows by name of the text, or of its file.

    Raises:
        CalibrationError: a text is too short, given twice, or belongs to another tokenizer; or
            ``window`` or ``limit`` is out of range.
    """
    config = source.config()
    window = window_length(window, getattr(config, "max_position_embeddings", None))
    cut: dict[str, Windows] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        name = text_name(text)
        if name in cut:
            raise CalibrationError(f"two texts are called {name!r}: leave out or rename one")
        cut[name] = cut_windows(source, text, window, limit, config.vocab_size, bos)
    return cut


def reference_of(
    source: ModelSource,
    reference: str | Path,
    dtype: torch.dtype,
    cache: str | Path | None,
    device: str | torch.device = "cpu",
) -> Predictions:
    """The predictions of the reference model that ``source`` is compared with.

    Other arguments are those of `evaluate`.

    Raises:
        BackendUnavailable: there is no such device.
        CalibrationError: the two models have vocabularies of different size.
        CheckpointError: there is no such model.
    """
    compared = locate(reference)
    if compared.config().vocab_size != source.config().vocab_size:
        raise CalibrationError(f"{reference} and {source.name} have different vocabularies")
    return Predictions(compared, dtype, None if cache is None else Path(cache), device)


def summary(
    name: str, scored: Iterable[Score], windows: Windows, on_window: OnWindow
) -> dict[str, Any]:
    """The measurements of one text, as `evaluate` returns them.

    Args:
        name: name of the text, for ``on_window``.
        scored: a score for each window, computed as it is asked for.
        windows: the windows.
        on_window: called after each window.
    """
    started = time.perf_counter()
    scores: list[Score] = []
    for score in scored:
        scores.append(score)
        on_window(name, len(scores), len(windows.tokens), perplexity_of(scores)[0])
    perplexity, stderr = perplexity_of(scores)
    return {
        "perplexity": perplexity,
        "stderr": stderr,
        "tokens": sum(score.tokens for score in scores),
        "windows": len(scores),
        "window": windows.tokens.shape[1],
        "digest": digest_of(windows.tokens),
        **_closeness(scores),
        "seconds": time.perf_counter() - started,
    }


def text_digests(cut: Mapping[str, Windows]) -> dict[str, str]:
    """Hashes of the windows of texts, by the texts' names."""
    return {name: digest_of(windows.tokens) for name, windows in cut.items()}


def digest_of(windows: Tensor) -> str:
    """A hash of the token ids ``windows`` in hexadecimal, which tells whether two texts agree."""
    return hashlib.blake2b(windows.numpy().tobytes(), digest_size=16).hexdigest()


def measure_tasks(
    model: PreTrainedModel,
    source: ModelSource,
    reference: Predictions | None,
    tasks: Tasks,
    bos: Bos,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run tasks and return their results as `evaluate` has them.

    Args:
        model: the model, loaded.
        source: the model's files, which hold its tokenizer.
        reference: the model to compare with; ``None`` for none.
        tasks: the tasks.
        bos: whether questions begin as the tokenizer begins a text, see `Tasks.run`.
        ranks: the processes that share the questions; each gets the results.

    Raises:
        PlanError: a task fails.
    """
    other = None if reference is None else reference_answers(reference, tasks, bos, ranks)
    return compare_tasks(tasks.run(model, source.tokenizer(), bos, ranks), other)


def reference_answers(
    reference: Predictions, tasks: Tasks, bos: Bos, ranks: Ranks = ALONE
) -> dict[str, TaskScore]:
    """The task scores of a reference model by task, which its cache keeps.

    Arguments are those of `measure_tasks`.

    Raises:
        PlanError: a task fails.
    """
    kept = f"tasks-{tasks.request.identity()}-{bos}"
    plain = ranks.of_first(lambda: reference.recall(kept))
    if plain is None:
        answered = tasks.run(reference.model, reference.source.tokenizer(), bos, ranks)
        plain = {name: asdict(score) for name, score in answered.items()}
        if ranks.first:
            reference.remember(kept, plain)
    return {name: TaskScore(**values) for name, values in plain.items()}


def _closeness(scores: list[Score]) -> dict[str, float | None]:
    """The measurements that need a reference, as `evaluate` has them; all ``None`` without one."""
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
    """Bits of packed tensors for each quantized weight; for a float model, file bits per parameter.

    Scales, zero points and outliers of the packed layers are included.
    """
    packed = [module for _, module in packed_modules(model)]
    if not packed:
        return source.weight_bytes() * 8 / sum(p.numel() for p in model.parameters())
    nbytes = sum(t.nbytes for module in packed for t in module.packed_tensors().values())
    return nbytes * 8 / sum(module.out_features * module.in_features for module in packed)
