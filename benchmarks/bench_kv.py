"""Decoding with packed keys and values against the cache of 16 bit, through the same attention.

Bytes are those of live tensors. All caches take one token by turns, so that a change of the machine's
load meets all; times are medians. Weights are random: only their shapes matter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from bench_bits import machine
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quantine.activations.attention import NAME, register
from quantine.activations.grids import StaticGrid
from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.core.bits import packed_bytes
from quantine.kernels.kv_attention import attend
from quantine.kernels.packed_states import PackedStates
from quantine.runtime.kv_cache import packed_cache

SMALL: Final = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
)
"""The shapes of SmolLM2-135M."""


def sites_of(model: PreTrainedModel) -> list[AttentionSites]:
    """Places for grids in every block."""
    made = []
    for block in model.model.layers:
        sites = AttentionSites()
        setattr(block.self_attn, SITES_NAME, sites)
        made.append(sites)
    return made


def put_grids(sites: list[AttentionSites], bits: int | None, config: LlamaConfig) -> None:
    """Grids of 16 clusters over -4..4 for keys and values; none for 16 bit."""
    channels = config.num_key_value_heads * config.head_dim
    for site in sites:
        for name in ("key", "value"):
            grid: nn.Module = nn.Identity()
            if bits is not None:
                scale, zero = torch.full((16,), 8 / 2**bits), torch.full((16,), 2.0 ** (bits - 1))
                labels = torch.arange(channels, dtype=torch.int32) % 16
                grid = StaticGrid(bits, scale, zero, labels)
            setattr(site, name, grid)


def filled(cache: DynamicCache, config: LlamaConfig, context: int, dtype: torch.dtype) -> None:
    """Give ``cache`` random states of ``context`` tokens."""
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for index in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), index)


def held(cache: DynamicCache) -> int:
    """Bytes of the memory behind a cache's keys and values."""
    tensors = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return sum(states.untyped_storage().nbytes() for states in tensors)


def statistics_of(sites: list[AttentionSites]) -> int:
    """Bytes of the grids of keys and values."""
    grids = [grid for site in sites for grid in (site.key, site.value)]
    return sum(buffer.nbytes for grid in grids for buffer in grid.buffers())


def milliseconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def by_turns(rivals: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Times of all, after two turns that are not measured."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(turns + 2):
        for name, run in rivals.items():
            spent = milliseconds(run)
            if turn > 1:
                times[name].append(spent)
    return times


def decoding(asked: argparse.Namespace, config: LlamaConfig) -> dict[str, Any]:
    """Bytes, and times of a token, of a whole model."""
    dtype = getattr(torch, asked.dtype)
    register()
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=NAME).eval()
    sites = sites_of(model)
    caches: dict[int, DynamicCache] = {}
    sizes = {}
    for bits in (16, *asked.bits):
        put_grids(sites, None if bits == 16 else bits, config)
        cache = packed_cache(model) or DynamicCache(config=config)
        filled(cache, config, asked.context, torch.bfloat16 if bits == 16 else dtype)
        caches[bits] = cache
        sizes[bits] = (held(cache), statistics_of(sites))
    token = torch.tensor([[7]])

    def step(bits: int) -> Callable[[], Any]:
        def run() -> None:
            model(input_ids=token, past_key_values=caches[bits], logits_to_keep=1)

        return run

    def prepared(bits: int) -> Callable[[], Any]:
        run = step(bits)

        def switched() -> float:
            put_grids(sites, None if bits == 16 else bits, config)
            return milliseconds(run)

        return switched

    times: dict[int, list[float]] = {bits: [] for bits in caches}
    for turn in range(asked.turns + 2):
        for bits in caches:
            spent = prepared(bits)()
            if turn > 1:
                times[bits].append(spent)
    full = sizes[16][0]
    return {
        str(bits): {
            "bytes": size,
            "statistics_bytes": grids,
            "of_16_bit": size / full,
            "over_its_share": size / (full * bits / 16 + grids),
            "milliseconds": statistics.median(times[bits]),
            "range": [min(times[bits]), max(times[bits])],
        }
        for bits, (size, grids) in sizes.items()
    }


def alone(asked: argparse.Namespace, config: LlamaConfig) -> dict[str, Any]:
    """Times of one call of attention."""
    generator = torch.Generator().manual_seed(0)
    heads, dim = config.num_key_value_heads, config.head_dim
    shape = (1, heads, asked.context, dim)
    query = torch.randn(1, config.num_attention_heads, 1, dim, generator=generator)
    half = query.bfloat16()
    kept = [torch.randn(shape, generator=generator).bfloat16() for _ in range(2)]

    def packed(bits: int) -> PackedStates:
        rows = (1, heads, asked.context, packed_bytes(dim, bits))
        codes = torch.randint(256, rows, generator=generator, dtype=torch.uint8)
        scale, zero = torch.full((heads, dim), 0.1), torch.full((heads, dim), 2.0)
        return PackedStates(codes, bits, scale, zero, torch.float32)

    def reading(key: Tensor, value: Tensor, asking: Tensor) -> Callable[[], Any]:
        return lambda: attend(asking, key, value, None, dim**-0.5)

    rivals: dict[str, Callable[[], Any]] = {
        "16": reading(*kept, half),
        "16, sdpa": lambda: scaled_dot_product_attention(half, *kept, enable_gqa=True),
    }
    for bits in asked.bits:
        rivals[str(bits)] = reading(packed(bits), packed(bits), query)
    times = by_turns(rivals, 3 * asked.turns)
    return {
        name: {"milliseconds": statistics.median(found), "range": [min(found), max(found)]}
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3], metavar="B")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--blocks", type=int, default=SMALL.num_hidden_layers, metavar="N")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--turns", type=int, default=15, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, too")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    config = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": asked.blocks})
    with torch.no_grad():
        found = {"attention": alone(asked, config), "decoding": decoding(asked, config)}
    print(f"one call of attention, {asked.context} tokens, {asked.threads} threads")
    for name, row in found["attention"].items():
        low, high = row["range"]
        print(f"  {name:9} {row['milliseconds']:8.3f} ms ({low:.3f}-{high:.3f})")
    print("a token, and the cache")
    for name, row in found["decoding"].items():
        low, high = row["range"]
        print(
            f"  {name:9} {row['milliseconds']:8.2f} ms ({low:.2f}-{high:.2f})  "
            f"{row['bytes'] / 1e6:7.2f} MB, {row['of_16_bit']:.4f} of 16 bit, "
            f"{row['over_its_share']:.4f} of bits/16 and {row['statistics_bytes'] / 1e6:.3f} MB "
            "of statistics"
        )
    if asked.json is not None:
        found["machine"] = machine(asked.threads)
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
