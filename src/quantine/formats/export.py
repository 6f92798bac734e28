"""Writing a finished directory in the layout of another engine.

What a layout holds is written without loss: decoded weights are the same numbers. What it does not
hold is refused by name, or rounded once more where the caller asks for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantine.core.activation_spec import ActivationSpec, activations_from
from quantine.core.ambient import own_state
from quantine.core.finite import is_finite
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError, OutputError, PlanError, cut, ending
from quantine.families import family_of
from quantine.families.layers import INPUTS_NAME, Layer, find_layers
from quantine.formats.complete import check_complete
from quantine.formats.described import read_config
from quantine.formats.directory import whole_directory
from quantine.formats.finished import FinishedDirectory
from quantine.formats.floats import as_asked, as_stored
from quantine.formats.foreign import target_named
from quantine.formats.foreign.engines import vllm_dtype_refusal
from quantine.formats.foreign.nearest import relative_error, rounded
from quantine.formats.foreign.plain import group_text
from quantine.formats.foreign.refusals import (
    Refused,
    check_quantized,
    is_rounded,
    refusals,
    refused_text,
)
from quantine.formats.foreign.spqr.layout import ARITHMETIC, MARK
from quantine.formats.foreign.target import Exportable, Matrix, Target
from quantine.formats.stored_config import spec_of
from quantine.formats.tokenizer_files import TOKENIZER, check_tokenizer, has_tokenizer
from quantine.source.model_source import ModelSource

OWN_FIELDS: Final = (
    "quantization_config", "transformers_weights", "torch_dtype", MARK, ARITHMETIC
)  # fmt: skip
"""Fields of ``config.json`` that an exported model does not have: ``torch_dtype`` is an old name of
``dtype``, which every layout says."""

GRID: Final = ("scale", "zero")
"""Tensors of the static grid on which the input of a matrix is rounded."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the directory.
        converted: for each layer that was rounded once more, by name: ``stored`` (its new grid, or
            ``float``) and ``error``, the change of its weights as a share of their norm.
        notes: what users of the directory have to know.
        nbytes: of all files.
    """

    path: Path
    converted: Mapping[str, Mapping[str, Any]]
    notes: list[str]
    nbytes: int


@own_state()
def export(
    path: str | Path,
    out: str | Path,
    to: str,
    *,
    nearest: bool = False,
    engine: str | None = None,
    dtype: torch.dtype | None = None,
    weights_of: str | None = None,
) -> Exported:
    """Write the finished directory ``path`` in the layout of another engine.

    Args:
        path: a directory that a run of quantine finished.
        out: the directory to write, new or empty; it exists whole or not at all.
        to: a row of `quantine.formats.foreign.FOREIGN`.
        nearest: round layers that the layout does not hold to its nearest grid; otherwise they are
            refused.
        engine: ``"vllm"`` refuses what vLLM does not serve of the layout.
        dtype: of floats, and in which engines are to compute; ``None`` leaves floats as they are
            stored, and decoded weights in float32.
        weights_of: a layout whose rounding is applied first, with ``nearest``; so that ``float``
            shows what another layout holds.

    Raises:
        PlanError: there is no such layout or engine, or its readers take no floats of ``dtype``.
        CheckpointError: the tokenizer of ``path`` is damaged.
        FormatError: ``path`` is no finished directory, a layer or the model does not fit; the
            message names it, the reason and the nearest plan.
        OutputError: ``out`` is taken, lies in ``path``, or cannot be written.
    """
    path, out = Path(path), Path(out)
    if out.resolve().is_relative_to(path.resolve()):
        raise OutputError(f"{ending(out)} lies in the directory that is exported: choose another")
    target = target_named(to)
    if target.float_dtype is not None and dtype not in (None, target.float_dtype):
        needed, given = (str(one).removeprefix("torch.") for one in (target.float_dtype, dtype))
        raise PlanError(f"readers of layout {to} compute in {needed}, not {given}: leave dtype out")
    reason = vllm_dtype_refusal(to, dtype) if engine == "vllm" else None
    if reason is not None:
        raise PlanError(reason)
    finished = FinishedDirectory(path)
    check_tokenizer(path)
    model = _Model.of(finished)
    found = refusals(
        weights_of or to,
        engine,
        model.config,
        model.matrices,
        model.activations,
        model.block_floats,
    )
    if found and not nearest:
        raise FormatError(refused_text(to, found))
    check_quantized(to, model.matrices, found)
    check_complete(finished, model.bare)
    source = _Source(finished, model, target, {one.name: one for one in found}, dtype)
    with whole_directory(out) as temporary:
        notes = [*target.write(source.exportable(), temporary), *source.notes()]
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    return Exported(out, source.converted, notes, nbytes)


@dataclass(frozen=True)
class _Model:
    """The model that a finished directory holds, without weights."""

    config: Any
    bare: Any
    settings: Mapping[str, Any]
    matrices: Mapping[str, Matrix]
    activations: ActivationSpec | None
    block_floats: Sequence[str]

    @classmethod
    def of(cls, finished: FinishedDirectory) -> _Model:
        said = finished.description.activations
        activations = None if said is None else activations_from(said, "config.json")
        source = ModelSource(str(finished.path), finished.path)
        config = source.config()
        for name in OWN_FIELDS:
            config.__dict__.pop(name, None)
        settings = {k: v for k, v in read_config(finished.path).items() if k not in OWN_FIELDS}
        bare = source.bare_model(config)
        layers = {layer.name: layer for layer in find_layers(bare, family_of(config))}
        matrices = {
            name: _matrix(finished, name, layers.get(name), bare, activations)
            for name in finished.description.layers
        }
        order = [name for name in layers if name in matrices]
        floats = [
            name for name, one in layers.items() if one.role == "block" and name not in matrices
        ]
        ordered = {name: matrices[name] for name in order}
        return cls(config, bare, settings, ordered, activations, floats)


def _matrix(
    finished: FinishedDirectory,
    name: str,
    layer: Layer | None,
    bare: Any,
    activations: ActivationSpec | None,
) -> Matrix:
    if layer is None or layer.module:
        raise FormatError(f"{name} is no whole weight of a module: only quantine reads it")
    packed = finished.description.packed[name]
    outliers = any(
        shape[0] > 0 for key in ("outlier_value", "col_vals") if (shape := packed.get(key))
    )
    ordered = any(size > 0 for size in packed.get("in_perm", ()))
    biased = getattr(bare.get_submodule(name), "bias", None) is not None
    return Matrix(
        name,
        layer.role,
        spec_of(finished.scheme(name)),
        layer.out_features,
        layer.in_features,
        outliers,
        ordered,
        layer.transposed,
        biased,
        is_rounded(layer.role, activations, bare.config, f"{name}.inputs.scale" in finished.kept),
    )


@dataclass(frozen=True)
class _Source:
    """Tensors of a finished directory, as a target is to get them."""

    finished: FinishedDirectory
    model: _Model
    target: Target
    refused: Mapping[str, Refused]
    dtype: torch.dtype | None
    converted: dict[str, dict[str, Any]] = field(default_factory=dict)
    shortened: list[str] = field(default_factory=list)

    def exportable(self) -> Exportable:
        return Exportable(
            self.finished.path,
            self.model.config,
            self.model.settings,
            self.model.bare,
            self.model.matrices,
            tuple(name for name in self.finished.kept if f".{INPUTS_NAME}." not in name),
            self.finished.description.kept_linears,
            self._read,
            self._read_float,
            self.dtype,
            self.model.activations,
            self._read_grid,
        )

    def _read(self, name: str) -> QTensor | Tensor:
        qtensor = self.finished.qtensor(name)
        if name not in self.refused and not self.target.decodes:
            return qtensor
        weight = qtensor.dequantize()
        stored, found = weight, None
        if name in self.refused:
            spec = self.refused[name].nearest
            if spec is not None:
                found = rounded(weight, spec)
                stored = found.dequantize()
            elif not self.target.decodes:
                stored = self._floats(name, weight)
            self._note(name, spec, stored, weight)
        if self.target.decodes:
            short = stored if self.dtype is None else as_asked(name, stored, self.dtype)
            if self.dtype is not None:
                self._note(name, None, short, weight)
            return short
        return found if found is not None else stored

    def _note(self, name: str, spec: QuantSpec | None, stored: Tensor, weight: Tensor) -> None:
        error = relative_error(stored, weight)
        as_said = "float" if spec is None else group_text(spec)
        self.converted[name] = {"stored": as_said, "error": error}

    def _read_float(self, name: str) -> Tensor:
        tensor = self.finished.kept_tensor(name)
        if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
            raise FormatError(f"{name} holds values that are not finite: it is damaged")
        if self.target.float_dtype is None and self.dtype is None:
            return tensor
        stored = self._floats(name, tensor)
        if not torch.equal(stored.to(tensor.dtype), tensor):
            self.shortened.append(name)
        return stored

    def _read_grid(self, name: str) -> dict[str, Tensor]:
        names = {key: f"{name}.{INPUTS_NAME}.{key}" for key in GRID}
        kept = self.finished.kept
        return {key: self.finished.kept_tensor(full) for key, full in names.items() if full in kept}

    def _floats(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` as the layout needs it, or else as the user wants it."""
        if self.target.float_dtype is None and self.dtype is not None:
            return as_asked(name, tensor, self.dtype)
        return as_stored(name, tensor, self.target.float_dtype)

    def notes(self) -> list[str]:
        """What was rounded beside quantized layers, and what is not there."""
        found = []
        if self.shortened:
            dtype = str(self.target.float_dtype or self.dtype).removeprefix("torch.")
            first, count = self.shortened[0], len(self.shortened)
            found = [f"{dtype} rounds {count} tensors that are not quantized, such as {cut(first)}"]
        if not has_tokenizer(self.finished.path):
            found.append(
                f"there is no tokenizer in {ending(self.finished.path)}, so none was written: put "
                f"the float model's {TOKENIZER} beside the weights, or engines take tokens only"
            )
        return found


def describe_errors(exported: Exported) -> list[str]:
    """A line for each layer that was rounded once more, for people."""
    return [
        f"{cut(name)}: {one['stored']}, changes its weights by {one['error']:.2%}"
        for name, one in exported.converted.items()
    ]
