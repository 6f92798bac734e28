"""Plans whose matrices are solved in the grid that another engine has."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from quantine.calibrate.segments import Calibration
from quantine.core.spec import WHOLE_ROW, QuantSpec
from quantine.core.transform_spec import Rotate
from quantine.errors import FormatError, PlanError, shown
from quantine.families.layers import Layer
from quantine.formats.foreign.gguf.metadata import architecture_of
from quantine.formats.foreign.gguf.mixtures import Build, mixture_named, type_in
from quantine.plan.plan import Plan
from quantine.plan.targets import LLAMA_CPP
from quantine.run.job import Job
from quantine.run.prepare import prepare
from quantine.source.gguf.weights import model_names

VLLM: Final = "vllm"
"""The target whose kernels take 4 bits in groups of `VLLM_GROUPS`."""
VLLM_GROUPS: Final = (128, 64, 32)
"""Sizes of groups, of which a matrix gets the first that divides its rows."""

TABLE: Final = {"method": "rtn", "clip": "mse"}
"""How the token table and the head are rounded."""


def has_plan(target: str) -> bool:
    """Whether ``target`` names grids to solve in, and not only a layout that holds several."""
    return target == VLLM or target.startswith(LLAMA_CPP)


def target_plan(
    model: str | Path, target: str, transforms: tuple[Rotate, ...] = (), **parameters: Any
) -> Plan:
    """A plan for one model, whose result another engine holds without loss.

    Args:
        model: where the model is, see `quantine.source.locate.locate`.
        target: ``llama.cpp:`` and a name of `quantine.formats.foreign.gguf.mixtures.MIXTURES`, or
            ``vllm``.
        transforms: of the plan. A rotation makes two of a table that the head shares.
        parameters: of the method of the matrices in the blocks, and ``method``, by default
            ``gptq``.

    Raises:
        PlanError: there is no such target, or the model has no such file.
        QuantineError: the model cannot be quantized at all, see `quantine.run.prepare.prepare`.
    """
    whole = replace(Plan.preset("rtn", group_size=WHOLE_ROW), transforms=transforms)
    job = prepare(model, whole, Calibration(samples=0), planned=True)
    specs = _vllm_specs(job) if target == VLLM else _ggml_specs(job, target)
    most = Counter(
        specs[layer.name] for layer in _layers(job) if layer.role == "block"
    ).most_common(1)[0][0]
    clip = "hessian" if parameters.get("method", "gptq") == "gptq" else "mse"
    method = {"method": "gptq", "clip": clip, **parameters}
    rules: list[dict[str, Any]] = []
    for layer in _layers(job):
        spec = specs[layer.name]
        if layer.role == "block" and spec != most:
            rules.append({"match": layer.name, **_scheme(spec, method)})
        elif layer.role != "block" and spec is not None:
            rules.append({"match": f"@{layer.role}", **_scheme(spec, TABLE)})
    rules.append({"match": "@blocks", **_scheme(most, method)})
    plan = Plan.from_dict({"name": target, "rules": rules})
    return replace(plan, transforms=transforms)


def _layers(job: Job) -> list[Layer]:
    """All matrices that are stored: a head that is the table is not one beside it."""
    layers = (decision.layer for decision in job.decisions)
    return [layer for layer in layers if not job.shares_table(layer)]


def _scheme(spec: QuantSpec | None, method: dict[str, Any]) -> dict[str, Any]:
    return {"method": "keep"} if spec is None else {**method, **spec.as_dict()}


def _vllm_specs(job: Job) -> dict[str, QuantSpec | None]:
    """4 bits without zero points in the blocks, floats elsewhere."""
    specs: dict[str, QuantSpec | None] = {}
    for layer in _layers(job):
        size = next((size for size in VLLM_GROUPS if layer.in_features % size == 0), WHOLE_ROW)
        specs[layer.name] = QuantSpec(4, size, True) if layer.role == "block" else None
    return specs


def _ggml_specs(job: Job, target: str) -> dict[str, QuantSpec | None]:
    """The grids of the types that llama.cpp gives the matrices."""
    architecture = architecture_of(job.config)
    if architecture is None:
        raise FormatError(f"GGUF files of model type {job.config.model_type} are not written")
    mixture = mixture_named(target.removeprefix(LLAMA_CPP), architecture)
    stored = {name: gguf for gguf, name in model_names(architecture, job.model).items()}
    shared = any(job.shares_table(decision.layer) for decision in job.decisions)
    blocks = 1 + max(layer.block for layer in _layers(job) if layer.block is not None)
    build = Build.of(architecture, job.config, blocks)
    specs: dict[str, QuantSpec | None] = {}
    for layer in _layers(job):
        if layer.stored_name not in stored:
            raise PlanError(f"{layer.name} has no place in a file of {shown(target)}")
        is_head = layer.role == "head" or (shared and layer.role == "embedding")
        name = stored[layer.stored_name]
        kind = type_in(mixture, name, layer.in_features, build, is_head)
        specs[layer.name] = None if kind is None else kind.spec
    return specs
