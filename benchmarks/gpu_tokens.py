"""Tokens a second of models of the shape of Llama 3 8B, packed and in bfloat16, in CUDA graphs.

Their weights are random, all blocks are there, and the embedding and the head stay in 16 bit. What
is timed is what `quantine generate` does for a token: a replayed graph, and the logits on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from allowance import Allowance
from quantine.core.spec import QuantSpec
from quantine.formats.sparse import Sparse
from quantine.runtime.graph_decoder import StaticDecoder, graph_decoder_for
from quantine.runtime.modules import QuantLinear

KINDS = {
    "4 bits, groups of 128": QuantSpec(4, 128),
    "3 bits, groups of 128": QuantSpec(3, 128),
    "3 bits, groups of 16, SpQR's statistics": QuantSpec(
        3, 16, scale_bits=3, zero_bits=3, stat_group_size=16
    ),
}
PROMPT = 128
"""Tokens before those that are timed."""
TOKENS = 64
"""Tokens of a measurement."""
RUNS = 5
"""Measurements, of which the median counts."""


class Shape(NamedTuple):
    """The numbers that make a model of the Llama family as large as it is."""

    width: int = 4096
    inner: int = 14336
    blocks: int = 32
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128256


LLAMA_8B = Shape()
Make = Callable[[Any, int], StaticDecoder]
"""Makes a decoder of a model for so many tokens."""


def timed_models(
    device: str,
    allowance: Allowance,
    shape: Shape = LLAMA_8B,
    make: Make = graph_decoder_for,
) -> list[dict[str, Any]]:
    """A row for each kind of model; bfloat16, which all are compared with, is the first."""
    floats = speed_of(model_of(shape, None, device), make)
    rows = [{"kind": "bfloat16", "tokens_per_second": round(floats, 1), "times_bfloat16": 1.0}]
    for name, spec in KINDS.items():
        rows += allowance.rows(name, partial(timed_model, name, spec, device, shape, make, floats))
    return rows


def timed_model(
    name: str, spec: QuantSpec, device: str, shape: Shape, make: Make, floats: float
) -> list[dict[str, Any]]:
    """The row of one kind of model; bfloat16 has ``floats`` tokens a second."""
    found = speed_of(model_of(shape, spec, device), make)
    times = round(found / floats, 2)
    row = {"kind": name, "tokens_per_second": round(found, 1), "times_bfloat16": times}
    print(row, flush=True)
    return [row]


def speed_of(model: Any, make: Make) -> float:
    """Tokens a second of ``model`` after a prompt, by the decoder that ``make`` makes."""
    decoder = make(model, PROMPT + TOKENS)
    found = []
    for _ in range(RUNS):
        decoder.reset()
        decoder.append(torch.arange(PROMPT) % 97 + 3)
        started = time.perf_counter()
        for _ in range(TOKENS):
            decoder.append(torch.tensor([5]))
        found.append(TOKENS / (time.perf_counter() - started))
    return statistics.median(found)


def model_of(shape: Shape, spec: QuantSpec | None, device: str) -> Any:
    """A model with random weights, in bfloat16, or with the matrices of its blocks of ``spec``."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for name, module in list(model.model.layers.named_modules()):
        if spec is not None and isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            packed = random_tensors(spec, rows, columns, device)
            parent, _, leaf = name.rpartition(".")
            made = QuantLinear("sparse", spec, rows, columns, packed)
            setattr(model.model.layers.get_submodule(parent), leaf, made)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.ones if parameter.ndim == 1 else random_weights
                filled = values(parameter.shape, dtype=torch.bfloat16, device=device)
                module._parameters[name] = nn.Parameter(filled, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


def random_weights(shape: torch.Size, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device) / shape[-1] ** 0.5


def random_tensors(spec: QuantSpec, rows: int, columns: int, device: str) -> dict[str, Tensor]:
    """Packed tensors of a matrix without outliers: any codes, and small scales."""
    found = {}
    for name, (shape, dtype) in Sparse().layout(spec, rows, columns, stores_order=False).items():
        if dtype == torch.uint8:
            found[name] = torch.randint(0, 256, shape, dtype=dtype, device=device)
        else:  # scales, and the grids of their codes
            found[name] = (torch.rand(shape, device=device) / 64 + 2**-9).to(dtype)
    return found
