"""The step of a run after its last block: tuning, where the plan asks for it.

Every part of the output is written once more with tuned numbers. A run that is killed meanwhile
goes on after the last block that was tuned, or begins to tune the whole model again, and gets the
same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from quantine.activations import attention
from quantine.core.qtensor import QTensor
from quantine.families.heads import Heads
from quantine.families.layers import Layer, block_list
from quantine.formats.floats import as_stored
from quantine.plan.decision import Decision
from quantine.plan.scheme_parsing import scheme_from
from quantine.rptq.blocks import reorder_as_before
from quantine.run.job import Job
from quantine.run.layer import Solved, held, packed_tensors, unpack
from quantine.run.store import Reports, RunStore
from quantine.run.tuning_cost import gradient_segments
from quantine.source.checkpoint import Checkpoint
from quantine.tuning.kept_blocks import KeptBlocks
from quantine.tuning.rounding import round_activations
from quantine.tuning.student import Student, float_model, sharing
from quantine.tuning.tune import tune

OUTCOME: Final = "tuning"
"""Name under which a run stores what tuning gained."""


def tuned_parts(
    job: Job,
    checkpoint: Checkpoint,
    store: RunStore,
    parts: list[str],
    note: Callable[[str], None],
) -> list[str]:
    """Tune the model that ``parts`` hold, and commit its parts anew.

    Args:
        job: the checked request, whose plan has ``tune``.
        checkpoint: the float weights of the source model.
        store: has ``parts``.
        parts: names of all parts of the output, in file order.
        note: receives lines about the progress.

    Returns:
        Names of the parts with tuned numbers, in the same order.

    Raises:
        CheckpointError: the source is not what it was when it was quantized.
        FormatError: a layout cannot hold a tuned matrix; the message names the layer.
    """
    names = [f"tuned-{part}" for part in parts]
    if all(store.is_committed(name) for name in names):
        return names
    tensors = {part: store.tensors(part) for part in parts}
    reports = {part: store.layer_reports([part]) for part in parts}
    everything = {
        name: value.to(job.device) for part in parts for name, value in tensors[part].items()
    }
    decisions = _decisions(job, [report for part in parts for report in reports[part]])
    matrices = {d.layer: unpack(d, everything) for d in decisions.values()}
    maps = {name: value for part in parts for name, value in store.maps(part).items()}
    made_up = [
        report["name"] for part in parts for report in reports[part] if report.get("made_up")
    ]
    student = _student(job, checkpoint, matrices, everything, maps, made_up)
    assert job.tuning_text is not None
    assert job.plan.tune is not None
    text, kept = job.tuning_text.to(job.device), KeptBlocks(store.tuned_blocks)
    at_once = gradient_segments(job)
    outcome = tune(student, job.family, text, job.plan.tune, at_once, kept, note)
    store.remember(OUTCOME, outcome.as_dict())
    note(f"tuned: divergence {outcome.before:.4f} before, {outcome.after:.4f} after")
    for part, name in zip(parts, names, strict=True):
        solved = [
            _solved(job, checkpoint, decisions[report["name"]], student) for report in reports[part]
        ]
        changed = {**tensors[part], **_vectors(job, tensors[part], student)}
        for one in solved:
            changed.update(packed_tensors(one))
        store.commit(name, changed, _reports(reports[part], solved), store.maps(part))
    return names


def _decisions(job: Job, reports: Reports) -> dict[str, Decision]:
    """The decision about each quantized layer, with the scheme that was used, by name."""
    used = {report["name"]: scheme_from(report["scheme"], "report") for report in reports}
    return {
        d.layer.name: replace(d, scheme=used[d.layer.name])
        for d in job.decisions
        if d.layer.name in used
    }


def _student(
    job: Job,
    checkpoint: Checkpoint,
    matrices: Mapping[Layer, QTensor],
    everything: Mapping[str, Tensor],
    maps: Mapping[str, Tensor],
    made_up: Sequence[str],
) -> Student:
    """The float model and the quantized one.

    Args:
        matrices: the quantized matrices.
        everything: all tensors of the parts, by name.
        maps: their tensors for pictures, by name.
        made_up: names of the matrices that make up for errors before them.
    """
    spec = job.plan.activations
    name = attention.NAME if spec is not None and job.family.attends else None
    teacher = float_model(job.config, checkpoint, job.device, name)
    model = sharing(teacher)
    if spec is not None:
        round_activations(model, job.family, spec, everything.get)
    if spec is not None and spec.reorders:
        heads = Heads.of(job.config, job.family)
        for index, block in enumerate(block_list(teacher, job.family)):
            path, family = f"{job.family.blocks}.{index}", job.family.in_block(index)
            reorder_as_before(block, path, family, heads, maps, everything)
    # A head that is stored beside a quantized table is one parameter with it in the float model.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    floats = {name: everything[name] for name in names if name in everything}
    dtype = torch.bfloat16 if job.calibration.bfloat16 else torch.float32
    return Student(teacher, model, matrices, floats, dtype, made_up)


def _solved(job: Job, checkpoint: Checkpoint, decision: Decision, student: Student) -> Solved:
    """What files hold of a tuned matrix."""
    layer = decision.layer
    if job.plan.activations is None:
        weight = job.float_weight(checkpoint, layer)
    else:  # reordered, and rounded to 16 bit where products are
        weight = layer.part_of(student.teacher.get_parameter(layer.stored_name)).float()
    return held(decision, student.whole.matrices[layer].qtensor(), weight, None)


def _vectors(job: Job, part: Mapping[str, Tensor], student: Student) -> dict[str, Tensor]:
    """The tuned vectors of a part, as files hold them."""
    return {
        name: as_stored(name, numbers.stored(), job.float_dtype()).cpu()
        for name, numbers in student.whole.vectors.items()
        if name in part
    }


def _reports(before: Reports, solved: list[Solved]) -> Reports:
    """The entries of tuned layers: their own errors, and what solving them took."""
    return [
        {**report, **{key: one.report()[key] for key in ("output_error", "weight_error")}}
        for report, one in zip(before, solved, strict=True)
    ]
