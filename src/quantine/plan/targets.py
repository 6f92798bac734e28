"""Whether what a plan makes can be exported to another engine without loss, before it is made."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from torch import nn

from quantine.errors import FormatError, PlanError
from quantine.families.family import Family
from quantine.formats.foreign.gguf.tokenizer import tokenizer_of
from quantine.formats.foreign.refusals import is_rounded, refusals, refused_text
from quantine.formats.foreign.target import Matrix
from quantine.plan.decision import Decision
from quantine.plan.plan import Plan
from quantine.plan.scheme import Scheme
from quantine.source.model_source import ModelSource

ENGINE_LAYOUTS: Final = {"vllm": "compressed-tensors"}
"""The layout in which an engine is to be served, where a target is an engine."""
LLAMA_CPP: Final = "llama.cpp:"
"""Beginning of the targets that are types, and mixtures of types, of GGUF files."""


class Planned(Protocol):
    """What a plan does to a model: of a `quantine.run.job.Job`, as much as a target asks."""

    @property
    def plan(self) -> Plan:
        """The plan."""
        ...

    @property
    def decisions(self) -> Sequence[Decision]:
        """What it does, one decision per layer of the model."""
        ...

    @property
    def config(self) -> Any:
        """The configuration of the model, in transformers."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model without weights."""
        ...

    @property
    def source(self) -> ModelSource:
        """Where the model comes from."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers."""
        ...

    @property
    def family(self) -> Family:
        """Of the model; where activations are rounded, with its links."""
        ...


def check_target(target: str, planned: Planned) -> None:
    """Refuse a plan whose result `quantine.formats.export.export` would refuse.

    A method that may keep outliers counts as keeping some. Numbers that do not fit, such as scales
    too small for float16, show only when they are there.

    Args:
        target: a row of `quantine.formats.foreign.FOREIGN`, an engine in `ENGINE_LAYOUTS`, or
            `LLAMA_CPP` and a name.
        planned: the plan and its model.

    Raises:
        PlanError: there is no such target; or a layer, the model or its tokenizer cannot be
            exported to it, and the message names the layer, the reason and the nearest grid.
    """
    layout = layout_of(target)
    engine = target if target in ENGINE_LAYOUTS else None
    decisions, activations = planned.decisions, planned.plan.activations
    most = max((len(decision.choices) for decision in decisions), default=0)
    for place in range(max(1, most)):
        matrices = {
            decision.layer.name: _matrix(
                decision,
                scheme,
                planned.model,
                is_rounded(
                    decision.layer.role,
                    activations,
                    planned.config,
                    not planned.family.leaves(decision.layer.name),
                ),
            )
            for decision in decisions
            if (scheme := _scheme(decision, place)) is not None
        }
        floats = [
            decision.layer.name
            for decision in decisions
            if decision.layer.role == "block" and decision.layer.name not in matrices
        ]
        try:
            found = refusals(layout, engine, planned.config, matrices, activations, floats)
        except FormatError as error:
            raise PlanError(str(error)) from error
        if found:
            raise PlanError(refused_text(layout, found))
    if layout == "gguf":
        _check_tokenizer(planned)


def _check_tokenizer(planned: Planned) -> None:
    """Refuse a tokenizer that a GGUF file cannot hold as it will be in the output."""
    with tempfile.TemporaryDirectory() as name:
        directory = planned.source.directory  # whose files are copied
        if planned.source.gguf_file is not None:
            planned.tokenizer.save_pretrained(name)
            directory = Path(name)
        try:
            tokenizer_of(directory, planned.config.vocab_size, planned.config.to_dict())
        except FormatError as error:
            raise PlanError(f"{planned.source.name}: {error}") from error


def layout_of(target: str) -> str:
    """The row of `quantine.formats.foreign.FOREIGN` that a target needs."""
    return "gguf" if target.startswith(LLAMA_CPP) else ENGINE_LAYOUTS.get(target, target)


def _scheme(decision: Decision, place: int) -> Scheme | None:
    """The choice at ``place``, the last of a layer that has fewer, or its only scheme."""
    choices = decision.choices
    return choices[min(place, len(choices) - 1)] if choices else decision.scheme


def _matrix(decision: Decision, scheme: Scheme, model: nn.Module, rounded: bool) -> Matrix:
    layer = decision.layer
    if layer.module:
        raise PlanError(f"{layer.name} is no whole weight of a module: only quantine reads it")
    return Matrix(
        layer.name,
        layer.role,
        scheme.spec,
        layer.out_features,
        layer.in_features,
        scheme.solver.outlier_share != 0,
        scheme.solver.stores_order(scheme.spec),
        layer.transposed,
        getattr(model.get_submodule(layer.name), "bias", None) is not None,
        rounded,
    )
