"""The loop of a comparison: quantize, measure and keep a row for each plan, or go on where it was.

``OUT/models/NAME`` are quantized directories, ``OUT/rows/NAME.json`` finished rows, and
``OUT/predictions`` what the float model says, which is computed once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantine.calibrate.bos import BOS_DEFAULT, Bos
from quantine.calibrate.segments import Calibration
from quantine.calibrate.text import text_name
from quantine.calibrate.text_files import text_file
from quantine.calibrate.token_stream import begun
from quantine.comparison.short_forms import FLOAT
from quantine.core.ambient import own_state
from quantine.core.device import CPU, device_facts, device_named
from quantine.core.process_memory import forget_peak_memory
from quantine.errors import OutputError, ResumeMismatch
from quantine.eval.evaluate import (
    OnWindow,
    bits_per_weight,
    cut_texts,
    evaluate,
    reference_answers,
    summary,
    text_digests,
)
from quantine.eval.perplexity import Score, Windows, dealt
from quantine.eval.predictions import Predictions
from quantine.eval.tasks import TaskRequest, Tasks, compare_tasks
from quantine.eval.text_speed import decode_speed
from quantine.formats.directory import read_json, write_json, writing
from quantine.plan.plan import Plan
from quantine.ranks.ranks import ALONE, Ranks
from quantine.run.directory_lock import LOCK_FILE, DirectoryLock
from quantine.run.prepare import prepare
from quantine.run.quantize import quantize
from quantine.run.rank_checks import check_ranks
from quantine.runtime.load import load_model
from quantine.source.locate import locate
from quantine.source.model_source import ModelSource

SETTINGS: Final = "settings.json"
"""Name of the file of what all rows of a comparison have in common."""
ROWS: Final = "rows"
"""Name of the directory of finished rows."""
MODELS: Final = "models"
"""Name of the directory of quantized models."""
PREDICTIONS: Final = "predictions"
"""Name of the directory of what the float model predicts."""
COMMON: Final = ("bits_per_weight", "model_bytes", "bos", "texts", "tasks")
"""What rows have of the result of `quantine.eval.evaluate.evaluate`."""
CONTEXT: Final = 128
"""Number of tokens before those whose decoding is timed."""
RUNS: Final = 5
"""Number of times that decoding is timed."""


@dataclass(frozen=True)
class Measured:
    """The texts and tasks that every row is measured on.

    Attributes:
        texts, window, limit, tasks, bos: see `quantine.eval.evaluate.evaluate`.
    """

    texts: tuple[str, ...]
    window: int | None = None
    limit: int | None = None
    tasks: TaskRequest | None = None
    bos: Bos = BOS_DEFAULT


@own_state()
def compare(
    model: str | Path,
    plans: Mapping[str, Plan],
    out: str | Path,
    calibration: Calibration,
    measured: Measured,
    *,
    device: str | torch.device = "cpu",
    ranks: Ranks = ALONE,
    on_step: Callable[[str], None] = lambda _: None,
    on_window: OnWindow = lambda *_: None,
) -> list[dict[str, Any]]:
    """Quantize ``model`` under every plan and measure each result, and the model itself.

    A row that is in ``out`` already is not made again, so the list of plans can grow, and a run
    that was stopped goes on with the plan, even the decoder block, at which it stopped.

    Args:
        plans: by name, see `quantine.comparison.short_forms.plans_of`.
        calibration: for every plan that needs one.
        device: where models are quantized, measured and timed, by PyTorch's name.
        ranks: the processes that share the work, see `quantine.run.quantize.quantize`. All get the
            rows, and the first one writes.
        on_step: told what is done next.

    Returns:
        Rows, that of the model first. Each has ``name``, ``plan`` (``None`` for the model),
        ``bits_per_weight`` and ``model_bytes`` (from the files), ``bos``, ``texts`` and ``tasks``
        (see `quantine.eval.evaluate.evaluate`), ``tokens_per_second`` (``median``, ``low`` and
        ``high`` after a prompt of `CONTEXT` tokens), ``seconds`` and ``peak_memory_bytes`` of
        quantizing (after an interruption, of the last part), and ``outlier_share`` of the quantized
        weights.

    Raises:
        QuantineError: of the kind that says what is wrong, before work starts where that can be.
    """
    out, source, where = Path(out), locate(model), device_named(device)
    tasks = None if measured.tasks is None else Tasks(measured.tasks)
    cut = cut_texts(source, measured.texts, measured.window, measured.limit, measured.bos)
    for each in plans.values():
        check_ranks(replace(prepare(model, each, calibration, where), ranks=ranks))
    settings = _settings(source, calibration, cut, tasks, measured.bos, where)
    ranks.agree(lambda: settings)
    lock = DirectoryLock(out)
    try:
        ranks.of_first(lambda: _open(out, lock, settings))
        reference = Predictions(source, torch.float32, out / PREDICTIONS, where)
        reference.reserve(cut.values())
        rows = []
        wanted: dict[str, Plan | None] = {FLOAT: None, **plans}
        for name, plan in wanted.items():
            path = out / ROWS / f"{name}.json"
            row = ranks.of_first(partial(_finished, path, plan))
            if row is None:
                on_step(name)
                if plan is None:
                    row = _float_row(reference, cut, tasks, measured.bos, on_window, ranks)
                    # A new one, without the model in memory.
                    reference = Predictions(source, torch.float32, out / PREDICTIONS, where)
                else:
                    row = _row(
                        model, plan, out, name, calibration, measured, where, on_window, ranks
                    )
                if ranks.first:
                    with writing(path):
                        write_json(path, row)
            rows.append(row)
        return rows
    finally:
        lock.release()


def _open(out: Path, lock: DirectoryLock, settings: dict[str, Any]) -> None:
    """Make ``out``, or check that it was made for the same comparison, and take its ``lock``."""
    with writing(out):
        lock.take()
        found = {path.name for path in out.iterdir()} - {LOCK_FILE}
        if found and SETTINGS not in found:
            raise OutputError(f"{out} is not empty and no comparison: choose another directory")
        (out / ROWS).mkdir(parents=True, exist_ok=True)
        (out / MODELS).mkdir(exist_ok=True)
        if not (out / SETTINGS).is_file():
            write_json(out / SETTINGS, settings)
    stored = read_json(out / SETTINGS)
    keys = [key for key in {**settings, **stored} if stored.get(key) != settings.get(key)]
    if keys:
        raise ResumeMismatch(
            f"the comparison in {out} was started with another {', '.join(keys)}: its rows could "
            "not be compared; repeat the first command, or choose another directory"
        )


def _settings(
    source: ModelSource,
    calibration: Calibration,
    cut: dict[str, Windows],
    tasks: Tasks | None,
    bos: Bos,
    device: torch.device,
) -> dict[str, Any]:
    """What all rows of a comparison have in common, as plain values."""
    file = text_file(calibration.source)
    data = "" if file is None else hashlib.blake2b(file.path.read_bytes()).hexdigest()
    named = {**asdict(calibration), "source": text_name(calibration.source), "digest": data}
    begins = [named.pop("bos"), bos]
    if named["shards"] == 1:  # as before there were any
        del named["shards"]
    return {
        "model": source.file_digests(),
        "calibration": named,
        # Where the tokenizer begins texts with nothing, both values of bos are the same.
        **({} if begun(source.tokenizer(), bos) == "none" else {"bos": begins}),
        "texts": text_digests(cut),
        "tasks": None if tasks is None else tasks.request.identity(),
        "threads": torch.get_num_threads(),
        # Other devices round other sums, and their seconds are others.
        **({} if device == CPU else device_facts(device)),
    }


def _finished(path: Path, plan: Plan | None) -> dict[str, Any] | None:
    """The row in ``path``; ``None`` if there is none yet.

    Raises:
        ResumeMismatch: it is the row of another plan.
    """
    if not path.is_file():
        return None
    row: dict[str, Any] = read_json(path)
    if row["plan"] != (None if plan is None else plan.as_dict()):
        raise ResumeMismatch(
            f"{path} was made with another plan of this name: rename the new one, or delete the "
            "row and its model"
        )
    return row


def _float_row(
    reference: Predictions,
    cut: dict[str, Windows],
    tasks: Tasks | None,
    bos: Bos,
    on_window: OnWindow,
    ranks: Ranks,
) -> dict[str, Any]:
    """The row of the model itself, from predictions that later rows are compared with."""
    source = reference.source

    def scores(windows: Windows) -> Iterator[Score]:
        def score(tokens: Tensor) -> Score:
            made = reference(tokens, windows.context)
            return Score(made.loss, 0.0, 0, len(made.top))

        return dealt(score, windows, ranks)

    texts = {
        name: summary(name, scores(windows), windows, on_window) for name, windows in cut.items()
    }
    answers = None if tasks is None else reference_answers(reference, tasks, bos, ranks)
    return {
        "name": FLOAT,
        "plan": None,
        "bits_per_weight": bits_per_weight(reference.model, source),
        "model_bytes": source.weight_bytes(),
        "bos": begun(source.tokenizer(), bos),
        "texts": texts,
        "tasks": {} if answers is None else compare_tasks(answers, None),
        "tokens_per_second": ranks.of_first(lambda: decode_speed(reference.model, CONTEXT, RUNS)),
        "seconds": None,
        "peak_memory_bytes": None,
        "outlier_share": None,
    }


def _row(
    model: str | Path,
    plan: Plan,
    out: Path,
    name: str,
    calibration: Calibration,
    measured: Measured,
    device: torch.device,
    on_window: OnWindow,
    ranks: Ranks,
) -> dict[str, Any]:
    """Quantize ``model`` under ``plan``, or go on with it, and measure what comes out."""
    directory = out / MODELS / name
    forget_peak_memory()
    resumed = ranks.of_first(directory.exists)
    report = quantize(
        model, directory, plan, calibration, resume=resumed, device=device, ranks=ranks
    ).report
    scores = evaluate(
        directory,
        measured.texts,
        window=measured.window,
        limit=measured.limit,
        reference=model,
        cache=out / PREDICTIONS,
        tasks=measured.tasks,
        bos=measured.bos,
        device=device,
        on_window=on_window,
        ranks=ranks,
    )

    def speed() -> dict[str, float]:
        packed = load_model(locate(directory), torch.float32, device)
        return decode_speed(packed, CONTEXT, RUNS)

    return {
        "name": name,
        "plan": plan.as_dict(),
        **{key: scores[key] for key in COMMON},
        "tokens_per_second": ranks.of_first(speed),
        "seconds": report["run"]["seconds"],
        "peak_memory_bytes": report["run"]["peak_memory_bytes"],
        "outlier_share": _outlier_share(report),
    }


def _outlier_share(report: dict[str, Any]) -> float | None:
    """Share of the quantized weights that are outliers; ``None`` where no weight is quantized."""
    weights: int = report["totals"]["quantized_weights"]
    kept: int = sum(layer["outliers"] for layer in report["layers"])
    return kept / weights if weights else None
