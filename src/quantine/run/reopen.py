"""A finished directory becomes an unfinished run: single layers are done again, or it is tuned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quantine.core.ambient import own_state
from quantine.core.tuning_spec import Tuning
from quantine.errors import OutputError, PlanError
from quantine.families.layers import block_list
from quantine.formats.directory import MAPS, REPORT, is_finished, read_json
from quantine.plan.plan import Plan
from quantine.plan.redo import plan_for_redo, redone_layers
from quantine.run.job import Job
from quantine.run.prepare import prepare
from quantine.run.request import REQUEST, Request, request_of
from quantine.run.store import AT_ONCE, RunStore, check_identity, stored_identity
from quantine.run.used_source import SOURCE
from quantine.source.read_record import ReadRecord
from quantine.source.weight_files import weight_files


@own_state()
def begin_redo(
    out: Path,
    request: Request,
    pattern: str,
    changes: Mapping[str, Any],
    device: str | torch.device = "cpu",
) -> Request:
    """Make an unfinished run of a finished directory, without the layers that are to be redone.

    What the directory holds stays until the run ends. Its result has the bytes of a run from the
    beginning with the plan of the request that is returned.

    Args:
        out: the finished directory.
        request: what was asked for, from `quantine.run.request.stored_request`.
        pattern: which layers are quantized again, see `quantine.plan.rules.Rule`.
        changes: their new parameters by name, such as ``{"damp": 0.05}``.
        device: where the first run computed.

    Returns:
        The request of the run that is now to be continued.

    Raises:
        OutputError: ``out`` is not finished, or another process works on it.
        PlanError: the pattern matches nothing, or parameters are not allowed.
        ResumeMismatch: the model, the text or a version is not that of the first run.
        QuantineError: as for `quantine.run.prepare.prepare`.
    """
    if "tuning" in _report(out, "--redo"):
        raise PlanError(f"{out} was tuned as a whole: its layers cannot be redone one by one")
    before = prepare(request.model, request.plan, request.calibration, device)
    names = redone_layers(before.decisions, pattern)
    plan = plan_for_redo(request.plan, before.decisions, names, changes)
    return _reopen(out, request, before, plan, names)


@own_state()
def begin_tuning(
    out: Path, request: Request, tuning: Tuning, device: str | torch.device = "cpu"
) -> Request:
    """Make an unfinished run of a finished directory, in which only tuning is left to be done.

    See `begin_redo`, also for ``out``, ``request``, ``device`` and what is returned.

    Args:
        out: see there.
        request: see there.
        tuning: how the model is tuned.
        device: see there.

    Raises:
        PlanError: ``out`` is tuned already, or cannot be tuned.
        QuantineError: as for `begin_redo`.
    """
    if "tuning" in _report(out, "--tune"):
        raise PlanError(f"{out} is tuned already, and what it was before is gone: quantize again")
    before = prepare(request.model, request.plan, request.calibration, device)
    return _reopen(out, request, before, replace(request.plan, tune=tuning), ())


def _report(out: Path, option: str) -> dict[str, Any]:
    """The report of a directory that has to be finished for ``option``."""
    if not is_finished(out):
        raise OutputError(f"{out} is not finished: continue it first, without {option}")
    report: dict[str, Any] = read_json(out / REPORT)
    return report


def _reopen(
    out: Path, request: Request, before: Job, plan: Plan, names: Collection[str]
) -> Request:
    """Make an unfinished run with ``plan`` of what the run ``before`` left in ``out``.

    The layers ``names``, and what depends on them, are left out.
    """
    record = ReadRecord()
    weights = _digest(before, record)
    check_identity(out, {**before.identity(weights), **_batches(out)})
    job = prepare(request.model, plan, request.calibration, before.device)
    again = Request(request.name, request.model, plan, request_of(job).calibration)
    store = RunStore(out)
    try:
        store.lock()
        kept = _kept_parts(job, names, before)
        identity = {**job.identity(None), **_batches(out)}
        store.open(identity)
        store.remember(SOURCE, record.as_plain())
        store.remember(REQUEST, again.as_plain())
        _commit(store, kept, read_json(out / REPORT)["layers"])
    finally:
        store.close()
    return again


def _digest(job: Job, record: ReadRecord) -> str:
    """The digest of the weights, which are recorded."""
    checkpoint = job.checkpoint(record)
    checkpoint.changed()  # which looks at the files before they are read
    return checkpoint.digest()


def _batches(out: Path) -> dict[str, str]:
    """What the identity of the first run says of its batches, which depend on memory."""
    found = stored_identity(out) or {}
    return {key: found[key] for key in (AT_ONCE,) if key in found}


def _kept_parts(job: Job, names: Collection[str], before: Job) -> dict[str, str]:
    """The parts of the finished directory that stay, by what the names of their tensors begin with.

    Blocks after a redone one read other inputs, unless the plan takes those of the float model. A
    head whose table is redone may become a matrix of its own, which the directory does not have.
    """
    redone = [d.layer for d in job.decisions if d.layer.name in names]
    count = len(block_list(job.model, job.family))
    numbers = {layer.block for layer in redone if layer.block is not None}
    if not job.plan.float_inputs and job.segments is not None:
        table = any(layer.role == "embedding" for layer in redone)
        numbers = set(range(0 if table else min(numbers, default=count), count))
    blocks = {
        f"{job.family.blocks}.{index}.": f"block-{index:05}"
        for index in range(count)
        if index not in numbers
    }
    stored = {d.layer.name for d in before.scheme_layers() if not before.shares_table(d.layer)}
    tables = [d.layer.name for d in job.scheme_layers() if d.layer.role != "block"]
    stay = [name for name in tables if name in stored and name not in names]
    return {**blocks, **{f"{name}.": name for name in stay}}


def _commit(store: RunStore, kept: Mapping[str, str], reports: list[dict[str, Any]]) -> None:
    """Commit the ``kept`` parts of the finished directory; the others are made by the run."""
    out = store.out
    for prefix, part in kept.items():
        tensors: dict[str, Tensor] = {}
        maps: dict[str, Tensor] = {}
        for file in weight_files(out):
            tensors.update(_beginning(file, prefix))
        if (out / MAPS).is_file():
            maps = _beginning(out / MAPS, prefix)
        own = [report for report in reports if f"{report['name']}.".startswith(prefix)]
        store.commit(part, tensors, own, maps)


def _beginning(file: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a file whose names, with a dot after them, begin with ``prefix``."""
    with safe_open(file, framework="pt") as shard:
        names = shard.keys()  # a handle is not iterable itself
        own = [name for name in names if f"{name}.".startswith(prefix)]
        return {name: shard.get_tensor(name).clone() for name in own}
