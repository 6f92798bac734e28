"""One matrix of a model: read, solve, put in place, store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantine.core.grid import LARGEST_SCALE
from quantine.core.observe import Hessian
from quantine.core.qtensor import QTensor
from quantine.core.sensitivity import sensitivity_map
from quantine.errors import FormatError, SolverError
from quantine.families.base import Layer
from quantine.formats import format_named
from quantine.formats.checkpoint import Checkpoint
from quantine.plan import Decision


def read_weight(checkpoint: Checkpoint, layer: Layer, stored_name: str) -> Tensor:
    """The float weight of ``layer`` as ``[out, in]`` float32."""
    weight = checkpoint.read([stored_name])[stored_name].float()
    return weight.T.contiguous() if layer.transposed else weight


def present_weight(model: nn.Module, layer: Layer) -> Tensor:
    """The weight ``[out, in]`` float32 that ``layer`` has in ``model`` now, as a copy."""
    weight = model.get_submodule(layer.name).get_parameter("weight").detach()
    return (weight.T if layer.transposed else weight).clone(memory_format=torch.contiguous_format)


def solve(
    decision: Decision, weight: Tensor, hessian: Hessian | None
) -> tuple[QTensor, dict[str, Tensor], dict[str, Any]]:
    """Quantize one matrix.

    Args:
        weight: ``[out, in]`` float32.
        hessian: statistics of its input, if any were taken.

    Returns:
        The result as it is stored, its packed tensors by full name, and the layer's report.

    Raises:
        SolverError: names the layer.
        FormatError: likewise; the layout cannot hold the result.
    """
    layer, scheme = decision.layer, decision.scheme
    assert scheme is not None
    started = time.perf_counter()
    layout = format_named(scheme.format)
    try:
        packed = layout.pack(scheme.solver(weight, hessian, scheme.spec))
    except (SolverError, FormatError) as error:
        raise type(error)(f"{layer.name}: {error}") from error
    # What is stored is what runs, also where a layout rounds.
    qtensor = layout.unpack(packed, scheme.spec, layer.in_features)
    nbytes = sum(tensor.nbytes for tensor in packed.values())
    delta = qtensor.dequantize().sub_(weight)
    report = {
        "name": layer.name,
        "scheme": scheme.as_dict(),
        "shape": [layer.out_features, layer.in_features],
        "weights": layer.weights,
        "bytes": nbytes,
        "bits_per_weight": nbytes * 8 / layer.weights,
        "outliers": 0 if qtensor.outliers is None else qtensor.outliers.entries,
        "output_error": _output_error(delta, weight, hessian),
        "weight_error": float(delta.square().sum() / weight.square().sum().clamp(min=1e-30)),
        "damp": hessian.damp_used if hessian and scheme.solver.needs_inputs else None,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return qtensor, {f"{layer.name}.{key}": value for key, value in packed.items()}, report


def sensitivity(
    decision: Decision, weight: Tensor, hessian: Hessian | None, qtensor: QTensor
) -> dict[str, Tensor]:
    """The sensitivity map of a solved matrix by its layer's name.

    Nothing for layers whose solver did not use the inverse of ``hessian``. Arguments as of `solve`.
    """
    assert decision.scheme is not None
    used = hessian is not None and decision.scheme.solver.needs_inputs
    inverse = hessian.inverse_diagonal() if hessian and used else None
    if inverse is None:
        return {}
    return {decision.layer.name: sensitivity_map(weight, qtensor, inverse)}


def install(model: nn.Module, layer: Layer, qtensor: QTensor) -> None:
    """Let ``model`` compute with what will really run from here on."""
    weight = qtensor.dequantize()
    if layer.transposed:
        weight = weight.T.contiguous()
    model.get_submodule(layer.name).weight = nn.Parameter(weight, requires_grad=False)


def unpack(decision: Decision, tensors: Mapping[str, Tensor]) -> QTensor:
    """The result stored among ``tensors``, which go by full names."""
    layer, scheme = decision.layer, decision.scheme
    assert scheme is not None
    layout = format_named(scheme.format)
    names = {key: f"{layer.name}.{key}" for key in layout.tensor_names}
    packed = {key: tensors[name] for key, name in names.items() if name in tensors}
    return layout.unpack(packed, scheme.spec, layer.in_features)


def as_stored(name: str, tensor: Tensor, float16: bool = False) -> Tensor:
    """A float tensor that is not quantized, as the output stores it.

    A float32 matrix becomes float16 unless it overflows there; vectors keep their dtype.

    Args:
        name: of the tensor, for the error.
        float16: every float becomes float16, as the readers of format spqr need it.

    Raises:
        FormatError: ``tensor`` overflows in float16, but has to be stored so.
    """
    if float16 and tensor.is_floating_point():
        half = tensor.half()
        if not bool(torch.isfinite(half).all()):
            raise FormatError(
                f"{name} reaches {tensor.abs().max().item():.4g}, but beside format spqr "
                f"everything is float16 (at most {LARGEST_SCALE:g}): use format sparse"
            )
        return half
    if tensor.ndim < 2 or tensor.dtype not in {torch.float32, torch.float64}:
        return tensor
    low, high = tensor.aminmax()
    fits = float(low) >= -LARGEST_SCALE and float(high) <= LARGEST_SCALE
    return tensor.half() if fits else tensor.float()


def _output_error(delta: Tensor, weight: Tensor, hessian: Hessian | None) -> float | None:
    """Squared output error relative to the float layer's squared output."""
    if hessian is None or hessian.tokens == 0:
        return None
    return hessian.error_energy(delta) / max(hessian.error_energy(weight), 1e-30)
