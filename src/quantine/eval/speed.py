"""The speed of a packed model on this machine.

Products with each kind of matrix are compared with the speed at which memory can be read, and
decoding of text with that of other models. Everything compared is measured in turns, so that a
change of the machine's load affects all of it. GB are 1e9 bytes.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from quantine.core.ambient import own_state
from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.errors import BackendUnavailable, PlanError
from quantine.kernels import backend
from quantine.kernels.matrix import multiply, read_words
from quantine.runtime.decoder import Decoder, decoder_for, most_likely
from quantine.runtime.generate import ModuleDecoder
from quantine.runtime.load import load_model, load_packed
from quantine.runtime.modules import QuantLinear, TiedHead
from quantine.runtime.packed import Packed, packed_modules
from quantine.source.locate import locate
from quantine.source.model_source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_BYTES: Final = 2**29
"""Bytes read to measure the speed of memory, more than the processor's caches hold."""
WORK_BYTES: Final = 2**25
"""Bytes of matrices that one measurement of products reads, about: small matrices are repeated."""
DECODED: Final = 16
"""Number of tokens decoded in one measurement."""
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes of the float models that a packed model can be compared with, by name."""

Maker = Callable[[int], Decoder | ModuleDecoder]
"""A function that makes a decoder with room for a number of tokens."""
Timed = dict[str, float]
"""``median``, ``low`` and ``high`` of several measurements."""


@own_state()
def measure(
    directory: str | Path,
    *,
    against: str | None = None,
    contexts: tuple[int, ...] = (128, 2048),
    runs: int = 5,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a quantized model on this machine, with as many threads as PyTorch uses.

    Args:
        directory: a quantized model, named as for `quantine.source.locate.locate`.
        against: what else decodes, in turns with it: ``"float32"`` or ``"bfloat16"``, the modules
            of transformers with the same weights as floats; or another model, packed or float.
        contexts: numbers of tokens that precede those decoded; those too long for the model are
            shortened.
        runs: number of measurements of everything.
        on_step: called with a line that says what is measured next.

    Returns:
        * ``model``, its name, and ``arithmetic``, which its directory asks for;
        * ``threads``, and ``level``, the instruction set of the native kernels;
        * ``read``, the speed of memory in GB/s;
        * ``kernels``, for each kind of native matrix: ``name`` of the first, number of
          ``matrices``, ``shape``, ``format``, ``bits_per_weight`` in files and
          ``bits_in_memory``, and for ``exact`` and ``fast`` the speed in GB/s of packed bytes and
          its ``share`` of ``read``;
        * ``text``, for each model and context: ``name``, ``context``, and ``prefill`` and
          ``decode`` in tokens/s.

    Raises:
        BackendUnavailable: there is no native extension, and so nothing to measure.
        PlanError: an argument is out of range.
        CheckpointError, FormatError: a model cannot be read.
    """
    if runs < 1 or not contexts or min(contexts) < 1:
        raise PlanError(f"runs and contexts must be positive, not {runs} and {contexts}")
    native = backend.native()
    if native is None:
        raise BackendUnavailable("the native extension is turned off or missing: nothing to time")
    source = locate(directory)
    model = load_packed(source, torch.float32)
    rivals = _rivals(source, model, against)
    kinds = _kinds(model)
    words = torch.ones(READ_BYTES // 8, dtype=torch.int64, device="cpu")
    read: list[float] = []
    speeds: dict[tuple[str, str], list[float]] = {}
    for run in range(runs):
        on_step(f"matrices, {run + 1} of {runs}")
        read.append(READ_BYTES / _seconds(lambda: read_words(words)) / 1e9)
        for name, modules in kinds.items():
            for arithmetic in ARITHMETICS:
                speed = _product_speed(modules, arithmetic)
                speeds.setdefault((name, arithmetic), []).append(speed)
    ceiling = statistics.median(read)
    return {
        "model": source.name,
        "arithmetic": next(module.arithmetic for _, module in packed_modules(model)),
        "threads": torch.get_num_threads(),
        "level": native.level(),
        "read": _timed(read),
        "kernels": [
            {**_described(name, modules), **_shares(name, speeds, ceiling)}
            for name, modules in kinds.items()
        ],
        "text": _text(rivals, _fitting(source, contexts), runs, on_step),
    }


@own_state()
def decode_speed(model: PreTrainedModel, context: int, runs: int) -> Timed:
    """The speed of decoding in tokens/s.

    Packed models decode natively with exact arithmetic where that is possible, others with their
    modules.

    Args:
        model: a packed or float model.
        context: number of tokens before those that are decoded; fewer where the model's context is
            shorter.
        runs: number of measurements.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None:
        context = min(context, max(1, longest - DECODED - 1))
    rivals = _native_rivals(model) if any(packed_modules(model)) else {}
    if "native exact" in rivals:
        decoder = rivals["native exact"](context + DECODED)
    else:
        decoder = ModuleDecoder(model)
    prompt = torch.arange(context, device="cpu") % 97 + 3
    speeds = []
    for _ in range(runs):
        decoder.reset()
        decoder.append(prompt)
        speeds.append(DECODED / _seconds(functools.partial(_decode, decoder)))
    return _timed(speeds)


def _kinds(model: PreTrainedModel) -> dict[str, list[Packed]]:
    """Packed modules of the same layout, spec and shape, by the name of the first of each kind.

    Modules without a native matrix are left out, see `quantine.kernels.matrix.packed_matrix`.
    """
    found: dict[tuple[object, ...], list[tuple[str, Packed]]] = {}
    for name, module in packed_modules(model):
        kind = (module.format_name, module.spec, module.out_features, module.in_features)
        if module.matrix() is not None:
            found.setdefault(kind, []).append((name, module))
    return {alike[0][0]: [module for _, module in alike] for alike in found.values()}


def _product_speed(modules: list[Packed], arithmetic: Arithmetic) -> float:
    """Speed of products with one row of activations, in GB/s of packed bytes.

    The matrices of ``modules`` are multiplied in turn. If all of them fit into the processor's
    caches they are read from there, as they may be while a model decodes.
    """
    matrices = [module.matrix() for module in modules]
    nbytes = sum(matrix.nbytes for matrix in matrices)
    rounds = max(1, WORK_BYTES // nbytes)
    x = torch.ones(1, modules[0].in_features, dtype=torch.float32, device="cpu")

    def multiply_all() -> None:
        for _ in range(rounds):
            for matrix in matrices:
                multiply([matrix], x, arithmetic)

    return float(rounds * nbytes / _seconds(multiply_all) / 1e9)


def _described(name: str, modules: list[Packed]) -> dict[str, Any]:
    first, matrix = modules[0], modules[0].matrix()
    nbytes = sum(tensor.nbytes for tensor in first.packed_tensors().values())
    weights = first.out_features * first.in_features
    return {
        "name": name,
        "matrices": len(modules),
        "shape": [first.out_features, first.in_features],
        "format": first.format_name,
        "bits_per_weight": nbytes * 8 / weights,
        "bits_in_memory": matrix.nbytes * 8 / weights,
    }


def _shares(
    name: str, speeds: dict[tuple[str, str], list[float]], ceiling: float
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arithmetic in ARITHMETICS:
        timed = _timed(speeds[name, arithmetic])
        found[arithmetic] = {**timed, "share": timed["median"] / ceiling}
    return found


def _rivals(source: ModelSource, model: PreTrainedModel, against: str | None) -> dict[str, Maker]:
    """The decoders that are compared, by name: native, modules, and what ``against`` asks for."""
    rivals: dict[str, Maker] = {"modules": lambda room: ModuleDecoder(model)}
    rivals.update(_native_rivals(model))
    if against in DTYPES:
        floats = _as_floats(source, DTYPES[against])
        rivals[f"transformers {against}"] = lambda room: ModuleDecoder(floats)
    elif against is not None:
        other = load_model(locate(against), torch.float32)
        rivals[f"{against}, modules"] = lambda room: ModuleDecoder(other)
        rivals.update({f"{against}, {name}": make for name, make in _native_rivals(other).items()})
    return rivals


def _native_rivals(model: PreTrainedModel) -> dict[str, Maker]:
    """The native decoders of ``model`` by arithmetic; empty where there is none."""
    try:
        decoder_for(model, 1)
    except BackendUnavailable:
        return {}
    return {
        "native exact": lambda room: decoder_for(model, room, arithmetic="exact"),
        "native fast": lambda room: decoder_for(model, room, arithmetic="fast"),
    }


def _as_floats(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The packed model of ``source`` with its linear layers decoded to floats, in ``dtype``."""
    model = load_packed(source, torch.float32)
    for name, module in list(model.named_modules()):
        plain: torch.nn.Module
        if isinstance(module, QuantLinear | TiedHead):
            packed = module.table if isinstance(module, TiedHead) else module
            plain = torch.nn.Linear(packed.in_features, packed.out_features, bias=False)
            plain.weight = torch.nn.Parameter(packed.dequantize(), requires_grad=False)
            plain.register_parameter("bias", getattr(module, "bias", None))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    floats: Any = model
    cast: PreTrainedModel = floats.to(dtype)
    return cast


def _fitting(source: ModelSource, contexts: tuple[int, ...]) -> list[int]:
    longest = getattr(source.config(), "max_position_embeddings", None)
    room = max(contexts) if longest is None else max(1, longest - DECODED - 1)
    return sorted({min(context, room) for context in contexts})


def _text(
    rivals: dict[str, Maker],
    contexts: list[int],
    runs: int,
    on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    found: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for context in contexts:
        prompt = torch.arange(context, device="cpu") % 97 + 3
        decoders = {name: make(context + DECODED) for name, make in rivals.items()}
        for run in range(runs):
            for name, decoder in decoders.items():
                on_step(f"{name} after {context} tokens, {run + 1} of {runs}")
                decoder.reset()
                prefill, decode = found.setdefault((name, context), ([], []))
                prefill.append(context / _seconds(functools.partial(decoder.append, prompt)))
                decode.append(DECODED / _seconds(functools.partial(_decode, decoder)))
    return [
        {"name": name, "context": context, "prefill": _timed(prefill), "decode": _timed(decode)}
        for (name, context), (prefill, decode) in found.items()
    ]


def _decode(decoder: Decoder | ModuleDecoder) -> None:
    token = torch.tensor([3], dtype=torch.int64, device="cpu")
    for _ in range(DECODED):
        chosen = most_likely(decoder.append(token))
        token = torch.tensor([chosen], dtype=torch.int64, device="cpu")


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _timed(values: list[float]) -> Timed:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
