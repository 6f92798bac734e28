"""How fast models read prompts and write tokens, in turns, so that a machine's load affects all."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch

from quantine.core.ambient import own_state
from quantine.core.device import CPU
from quantine.errors import BackendUnavailable
from quantine.runtime.decoder import Decoder, decoder_for, most_likely
from quantine.runtime.generate import ModuleDecoder
from quantine.runtime.graph_decoder import StaticDecoder, graph_decoder_for
from quantine.runtime.load import load_model, load_packed
from quantine.runtime.modules import QuantLinear, TiedHead
from quantine.runtime.packed import packed_modules
from quantine.source.locate import locate
from quantine.source.model_source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODED: Final = 16
"""Number of tokens decoded in one measurement."""
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes of the float models that a packed model can be compared with, by name."""

AnyDecoder = Decoder | StaticDecoder | ModuleDecoder
"""Whatever continues a text."""
Maker = Callable[[int], AnyDecoder]
"""A function that makes a decoder with room for a number of tokens."""
Timed = dict[str, float]
"""``median``, ``low`` and ``high`` of several measurements."""


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
    rivals = _fast_rivals(model) if any(packed_modules(model)) else {}
    make = next(iter(rivals.values()), lambda _: ModuleDecoder(model))
    decoder, prompt = make(context + DECODED), prompt_of(context)
    speeds = []
    for _ in range(runs):
        decoder.reset()
        decoder.append(prompt)
        speeds.append(DECODED / seconds(functools.partial(decode_tokens, decoder)))
    return timed(speeds)


def rivals_of(source: ModelSource, model: PreTrainedModel, against: str | None) -> dict[str, Maker]:
    """What decodes text, by name: what quantine has for the model's device, and its modules.

    Args:
        source: where ``model`` comes from.
        model: a packed model.
        against: what else: a name in `DTYPES`, the weights as floats of this dtype, or a model.
    """
    found: dict[str, Maker] = {"modules": lambda room: ModuleDecoder(model)} | _fast_rivals(model)
    if against in DTYPES:
        floats = _as_floats(source, DTYPES[against], model.device)
        found[f"transformers {against}"] = lambda room: ModuleDecoder(floats)
        if model.device != CPU:
            graphs = {f"{against}, {name}": make for name, make in _fast_rivals(floats).items()}
            found.update(graphs)
    elif against is not None:
        other = load_model(locate(against), model.dtype, model.device)
        found[f"{against}, modules"] = lambda room: ModuleDecoder(other)
        found.update({f"{against}, {name}": make for name, make in _fast_rivals(other).items()})
    return found


def _fast_rivals(model: PreTrainedModel) -> dict[str, Maker]:
    """Quantine's decoders for ``model`` on its device, the most precise first, or none."""
    try:
        if model.device.type == "cuda":
            graph_decoder_for(model, 1)
            return {"CUDA graph": lambda room: graph_decoder_for(model, room)}
        decoder_for(model, 1)
    except BackendUnavailable:
        return {}
    return {
        "native exact": lambda room: decoder_for(model, room, arithmetic="exact"),
        "native fast": lambda room: decoder_for(model, room, arithmetic="fast"),
    }


def _as_floats(source: ModelSource, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The packed model of ``source`` with its linear layers decoded to floats, in ``dtype``."""
    model = load_packed(source, dtype, device=device)
    for name, module in list(model.named_modules()):
        plain: torch.nn.Module
        if isinstance(module, QuantLinear | TiedHead):
            packed = module.table if isinstance(module, TiedHead) else module
            weight = packed.dequantize(device).to(dtype)
            shape = packed.in_features, packed.out_features
            plain = torch.nn.Linear(*shape, bias=False, device="meta", dtype=dtype)
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            plain.register_parameter("bias", getattr(module, "bias", None))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    return model


def fitting(source: ModelSource, contexts: tuple[int, ...]) -> list[int]:
    """``contexts``, the model's own longest in place of those that are longer."""
    longest = getattr(source.config(), "max_position_embeddings", None)
    room = max(contexts) if longest is None else max(1, longest - DECODED - 1)
    return sorted({min(context, room) for context in contexts})


def text_speeds(
    rivals: dict[str, Maker],
    contexts: list[int],
    runs: int,
    on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """For each of ``rivals`` and ``contexts``: ``name``, ``context``, ``prefill``, ``decode``."""
    found: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for context in contexts:
        decoders = {name: make(context + DECODED) for name, make in rivals.items()}
        for run in range(runs):
            for name, decoder in decoders.items():
                on_step(f"{name} after {context} tokens, {run + 1} of {runs}")
                decoder.reset()
                prefill, decode = found.setdefault((name, context), ([], []))
                read = functools.partial(decoder.append, prompt_of(context))
                prefill.append(context / seconds(read))
                decode.append(DECODED / seconds(functools.partial(decode_tokens, decoder)))
    return [
        {"name": name, "context": context, "prefill": timed(prefill), "decode": timed(decode)}
        for (name, context), (prefill, decode) in found.items()
    ]


def prompt_of(tokens: int) -> torch.Tensor:
    """So many ``tokens``, whatever the model."""
    return torch.arange(tokens, device="cpu") % 97 + 3


def decode_tokens(decoder: AnyDecoder) -> None:
    """Write `DECODED` tokens, each the most likely one."""
    token = torch.tensor([3], dtype=torch.int64, device="cpu")
    for _ in range(DECODED):
        chosen = most_likely(decoder.append(token))
        token = torch.tensor([chosen], dtype=torch.int64, device="cpu")


def seconds(work: Callable[[], Any]) -> float:
    """How long ``work`` takes, whose results are on the CPU."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def timed(values: list[float]) -> Timed:
    """``values`` in three numbers."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
