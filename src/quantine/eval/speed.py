"""The speed of a packed model on this machine, or on a device of it.

Products with each kind of matrix are compared with the speed at which memory can be read, and
decoding of text with that of other models. Everything compared is measured in turns, so that a
change of the machine's load affects all of it. GB are 1e9 bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from quantine.core.ambient import own_state
from quantine.core.arithmetic import ARITHMETICS
from quantine.core.device import CPU, device_named
from quantine.errors import BackendUnavailable, PlanError
from quantine.eval.device_speed import copy_speed, device_bytes, product_speed, timer_of
from quantine.eval.text_speed import fitting, rivals_of, seconds, text_speeds, timed
from quantine.kernels import backend
from quantine.kernels.matrix import multiply, read_words
from quantine.runtime.load import load_packed
from quantine.runtime.packed import Packed, packed_modules
from quantine.source.locate import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_BYTES: Final = 2**29
"""Bytes read to measure the speed of memory, more than the processor's caches hold."""
WORK_BYTES: Final = 2**25
"""Bytes of matrices that one measurement of products reads, about: small matrices are repeated."""
GPU_ARITHMETICS: Final = ("float16",)
"""Kinds of arithmetic of products on GPUs."""


@own_state()
def measure(
    directory: str | Path,
    *,
    against: str | None = None,
    contexts: tuple[int, ...] = (128, 2048),
    runs: int = 5,
    device: str | torch.device = CPU,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a quantized model on this machine, with as many threads as PyTorch uses.

    On the CPU it computes in float32, elsewhere in bfloat16.

    Args:
        directory: a quantized model, named as for `quantine.source.locate.locate`.
        against: what else decodes, in turns with it: ``"float32"`` or ``"bfloat16"``, the modules
            of transformers with the same weights as floats; or another model, packed or float.
        contexts: numbers of tokens that precede those decoded; those too long for the model are
            shortened.
        runs: number of measurements of everything.
        device: what is measured, by PyTorch's name; or ``"auto"``.
        on_step: called with a line that says what is measured next.

    Returns:
        * ``model``, its name, and ``arithmetic``, which its directory asks for;
        * ``device``, ``threads``, and ``level``, the instruction set of the native kernels, or the
          name of a GPU;
        * ``read``, the speed of memory in GB/s: of reading on the CPU, elsewhere of copying;
        * ``kernels``, for each kind of matrix that kernels have: ``name`` of the first, number of
          ``matrices``, ``shape``, ``format``, ``bits_per_weight`` in files and
          ``bits_in_memory``, and for ``exact`` and ``fast``, on GPUs for ``float16``, the speed in
          GB/s of packed bytes and its ``share`` of ``read``;
        * ``decoded``, the same for each kind of matrix that no kernel multiplies, with the
          ``speed`` of its module, which decodes it at each use;
        * ``text``, for each model and context: ``name``, ``context``, and ``prefill`` and
          ``decode`` in tokens/s.

    Raises:
        BackendUnavailable: there is no such device; or no native extension on the CPU, and so
            nothing to measure.
        PlanError: an argument is out of range.
        CheckpointError, FormatError: a model cannot be read.
    """
    if runs < 1 or not contexts or min(contexts) < 1:
        raise PlanError(f"runs and contexts must be positive, not {runs} and {contexts}")
    where = device_named(device)
    native = backend.native()
    if where == CPU and native is None:
        raise BackendUnavailable("the native extension is turned off or missing: nothing to time")
    source = locate(directory)
    model = load_packed(source, torch.float32 if where == CPU else torch.bfloat16, device=where)
    rivals = rivals_of(source, model, against)
    kinds, others = _kinds(model, where)
    arithmetics = ARITHMETICS if where == CPU else GPU_ARITHMETICS
    read: list[float] = []
    speeds: dict[tuple[str, str], list[float]] = {}
    for run in range(runs):
        on_step(f"matrices, {run + 1} of {runs}")
        read.append(memory_speed(where))
        for name, modules in kinds.items():
            for arithmetic in arithmetics:
                speed = _product_speed(modules, where, arithmetic)
                speeds.setdefault((name, arithmetic), []).append(speed)
        for name, modules in others.items():
            speeds.setdefault((name, "decoded"), []).append(_module_speed(modules[0], where))
    ceiling = statistics.median(read)
    return {
        "model": source.name,
        "arithmetic": next(module.arithmetic for _, module in packed_modules(model)),
        "device": str(where),
        "threads": torch.get_num_threads(),
        "level": native.level() if where == CPU and native is not None else _name_of(where),
        "read": timed(read),
        "kernels": [
            {
                **_described(name, modules),
                "bits_in_memory": _bits_in_memory(modules[0], where),
                **{kind: _share(speeds[name, kind], ceiling) for kind in arithmetics},
            }
            for name, modules in kinds.items()
        ],
        "decoded": [
            {**_described(name, modules), "speed": _share(speeds[name, "decoded"], ceiling)}
            for name, modules in others.items()
        ],
        "text": text_speeds(rivals, fitting(source, contexts), runs, on_step),
    }


def _kinds(
    model: PreTrainedModel, device: torch.device
) -> tuple[dict[str, list[Packed]], dict[str, list[Packed]]]:
    """Packed modules of the same layout, spec and shape, by the name of the first of each kind.

    Returns:
        Those that kernels of ``device`` have a matrix for, and those that they have none for, see
        `quantine.kernels.matrix.packed_matrix`.
    """
    found: dict[tuple[object, ...], list[tuple[str, Packed]]] = {}
    for name, module in packed_modules(model):
        has = module.matrix(device) is not None
        kind = (has, module.format_name, module.spec, module.out_features, module.in_features)
        found.setdefault(kind, []).append((name, module))
    with_kernels, others = (
        {alike[0][0]: [one for _, one in alike] for kind, alike in found.items() if kind[0] is has}
        for has in (True, False)
    )
    return with_kernels, others


def memory_speed(device: torch.device) -> float:
    """Speed of memory in GB/s, see `measure`."""
    if device != CPU:
        return copy_speed(device, timer_of(device))
    words = torch.ones(READ_BYTES // 8, dtype=torch.int64, device="cpu")
    read_words(words)
    return READ_BYTES / seconds(lambda: read_words(words)) / 1e9


def _product_speed(modules: list[Packed], device: torch.device, arithmetic: Any) -> float:
    """Speed of products with one row of activations, in GB/s of packed bytes.

    The matrices of ``modules`` are multiplied in turn. If all of them fit into the processor's
    caches they are read from there, as they may be while a model decodes.
    """
    if device != CPU:
        return product_speed(modules, device, timer_of(device))
    matrices = [module.matrix() for module in modules]
    nbytes = sum(matrix.nbytes for matrix in matrices)
    rounds = max(1, WORK_BYTES // nbytes)
    x = torch.ones(1, modules[0].in_features, dtype=torch.float32, device="cpu")

    def multiply_all() -> None:
        for _ in range(rounds):
            for matrix in matrices:
                multiply([matrix], x, arithmetic)

    return float(rounds * nbytes / seconds(multiply_all) / 1e9)


def _module_speed(module: Packed, device: torch.device) -> float:
    """Speed of a product that decodes the matrix first, in GB/s of packed bytes."""
    dtype = torch.float32 if device == CPU else torch.bfloat16
    x = torch.ones(1, module.in_features, dtype=dtype, device=device)
    timer = seconds if device == CPU else timer_of(device)
    nbytes = sum(tensor.nbytes for tensor in module.packed_tensors().values())
    return float(nbytes / timer(lambda: module.product(x)) / 1e9)


def _described(name: str, modules: list[Packed]) -> dict[str, Any]:
    first = modules[0]
    nbytes = sum(tensor.nbytes for tensor in first.packed_tensors().values())
    return {
        "name": name,
        "matrices": len(modules),
        "shape": [first.out_features, first.in_features],
        "format": first.format_name,
        "bits_per_weight": nbytes * 8 / (first.out_features * first.in_features),
    }


def _bits_in_memory(module: Packed, device: torch.device) -> float:
    """Bits of a weight as kernels of ``device`` read the matrix."""
    matrix = module.matrix(device)
    held = matrix.nbytes if device == CPU else device_bytes(matrix)
    return float(held * 8 / (module.out_features * module.in_features))


def _share(speeds: list[float], ceiling: float) -> dict[str, float]:
    found = timed(speeds)
    return {**found, "share": found["median"] / ceiling}


def _name_of(device: torch.device) -> str:
    """What a GPU is called."""
    module: Any = getattr(torch, device.type, None)
    named = getattr(module, "get_device_name", None)
    return device.type if named is None else str(named(device))
