"""A block that an earlier process finished, as the run that goes on needs it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quantine.plan.scheme_parsing import scheme_from
from quantine.rptq.blocks import restore_block
from quantine.run.job import Job
from quantine.run.layer import unpack
from quantine.run.store import Reports


def restore_quantized(job: Job, tensors: dict[str, Tensor], index: int, reports: Reports) -> None:
    """Give a block that an earlier process finished its quantized weights.

    Nothing is done where the plan uses inputs of the float model, as later blocks then do not
    depend on quantized weights.

    Args:
        job: the checked request, whose model is changed.
        tensors: the committed tensors of the block, by full name.
        index: number of the block, from 0.
        reports: the entries of its layers in the report.
    """
    if job.plan.float_inputs:
        return
    tensors = {name: tensor.to(job.device) for name, tensor in tensors.items()}
    if job.plan.activations is not None:
        path = f"{job.family.blocks}.{index}"
        block = job.model.get_submodule(path)
        family = job.family.in_block(index)
        restore_block(job.model, block, path, family, job.plan.activations, tensors)
    schemes = {report["name"]: scheme_from(report["scheme"], "report") for report in reports}
    for decision in job.block_schemes(index):
        decision = replace(decision, scheme=schemes[decision.layer.name])
        decision.layer.write(job.model, unpack(decision, tensors).dequantize())
