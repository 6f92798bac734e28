"""Decoding with packed keys and values against the cache of 16 bit, through the same attention.

Bytes are those of live tensors. All caches take one token by turns, so that a change of the
machine's load meets all; times are medians. Weights are random: only their shapes matter.
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
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from bench_bits import machine
from quantine.activations.attention import NAME, register
from quantine.activations.grids import StaticGrid
from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.core.activation_spec import FINE_BITS
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.rptq.feedback import feedback_of
from quantine.runtime.kv_cache import Grids, PackedLayer, packed_cache

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


def put_grids(sites: list[AttentionSites], bits: int, config: LlamaConfig) -> None:
    """Grids over -4..4 for each channel of keys and values, with feedback for less than 8 bits.

    That is what schemes have. None for 16 bit.
    """
    heads, dim = config.num_key_value_heads, config.head_dim
    channels = heads * dim
    met = torch.randn(heads, 4 * dim, dim)
    feedback = feedback_of(met.transpose(1, 2) @ met)
    for site in sites:
        for name in ("key", "value"):
            grid: nn.Module = nn.Identity()
            if bits < 16:
                scale = torch.full((channels,), 8 / 2**bits)
                zero = torch.full((channels,), 2.0 ** (bits - 1))
                labels = torch.arange(channels, dtype=torch.int32)
                grid = StaticGrid(bits, scale, zero, labels, feedback if bits < FINE_BITS else None)
            setattr(site, name, grid)


def fill(cache: DynamicCache, config: LlamaConfig, context: int) -> None:
    """Give ``cache`` random states of ``context`` tokens."""
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for index in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), index)


def held(cache: DynamicCache) -> int:
    """Bytes of the memory behind a cache's keys and values."""
    tensors = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return sum(states.untyped_storage().nbytes() for states in tensors)


def statistics_of(cache: DynamicCache, sites: list[AttentionSites]) -> int:
    """Bytes of the grids of keys and values, and of what a cache makes of them."""
    grids = [grid for site in sites for grid in (site.key, site.value)]
    kept = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    return sum(buffer.nbytes for grid in grids for buffer in grid.buffers()) + sum(
        layer.statistics_nbytes for layer in kept
    )


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


def summary(times: list[float]) -> dict[str, Any]:
    return {"milliseconds": statistics.median(times), "range": [min(times), max(times)]}


def one_block(asked: argparse.Namespace, config: LlamaConfig) -> dict[str, Any]:
    """Times of a token of one block: its keys and values go to the cache, then attention."""
    heads, dim = config.num_key_value_heads, config.head_dim
    query = torch.randn(1, config.num_attention_heads, 1, dim).bfloat16()
    token = torch.randn(1, heads, 1, dim).bfloat16()
    kept = [torch.randn(1, heads, asked.context, dim).bfloat16() for _ in range(2)]
    site = AttentionSites()

    def layer_of(bits: int) -> DynamicLayer:
        put_grids([site], bits, config)
        made = (
            DynamicLayer() if bits == 16 else PackedLayer(Grids(site.key, site.value, site.centre))
        )
        made.update(*kept)
        return made

    def stepping(layer: DynamicLayer) -> Callable[[], Any]:
        return lambda: attend(query, *layer.update(token, token), None, Scoring(dim**-0.5))

    def reading(key: Tensor, value: Tensor) -> Callable[[], Any]:
        return lambda: attend(query, key, value, None, Scoring(dim**-0.5))

    rivals: dict[str, Callable[[], Any]] = {
        "16, attention only": reading(*kept),
        "16, PyTorch's own attention only": lambda: scaled_dot_product_attention(
            query, *kept, enable_gqa=True
        ),
    }
    for bits in asked.bits:
        rivals[f"{bits}, attention only"] = reading(*layer_of(bits).update(token, token))
    rivals |= {str(bits): stepping(layer_of(bits)) for bits in (16, *asked.bits)}
    return {name: summary(found) for name, found in by_turns(rivals, 3 * asked.turns).items()}


def decoding(asked: argparse.Namespace, config: LlamaConfig) -> dict[str, Any]:
    """Bytes, and times of a token, of a whole model in bfloat16."""
    register()
    model = LlamaForCausalLM._from_config(
        config, dtype=torch.bfloat16, attn_implementation=NAME
    ).eval()
    sites = sites_of(model)
    caches: dict[int, DynamicCache] = {}
    sizes = {}
    for bits in (*asked.bits, 16):  # the last grids stay: none
        put_grids(sites, bits, config)
        caches[bits] = packed_cache(model) or DynamicCache(config=config)
        fill(caches[bits], config, asked.context)
        sizes[bits] = (held(caches[bits]), statistics_of(caches[bits], sites))
    token = torch.tensor([[7]])

    def step(bits: int) -> Callable[[], Any]:
        return lambda: model(input_ids=token, past_key_values=caches[bits], logits_to_keep=1)

    times = by_turns({str(bits): step(bits) for bits in caches}, asked.turns)
    full = sizes[16][0]
    return {
        str(bits): {
            "bytes": size,
            "statistics_bytes": grids,
            "of_16_bit": (size + grids) / full,
            "over_its_share": size / (full * bits / 16),
            **summary(times[str(bits)]),
        }
        for bits, (size, grids) in sizes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3], metavar="B")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--blocks", type=int, default=SMALL.num_hidden_layers, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--turns", type=int, default=15, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, too")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    config = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": asked.blocks})
    torch.manual_seed(0)
    with torch.no_grad():
        found = {"block": one_block(asked, config), "model": decoding(asked, config)}
    print(f"{asked.context} tokens, {asked.threads} threads, a token of one block")
    for name, row in found["block"].items():
        low, high = row["range"]
        print(f"  {name:33} {row['milliseconds']:7.3f} ms ({low:.3f}-{high:.3f})")
    print(f"a token of the model, {asked.blocks} blocks")
    for name, row in found["model"].items():
        low, high = row["range"]
        print(
            f"  {name:3} {row['milliseconds']:7.1f} ms ({low:.1f}-{high:.1f}), "
            f"{row['bytes'] / 1e6:6.2f} MB, {row['over_its_share']:.4f} of bits / 16; "
            f"with {row['statistics_bytes'] / 1e6:.3f} MB of grids {row['of_16_bit']:.4f} of 16 bit"
        )
    if asked.json is not None:
        found["machine"] = machine(asked.threads)
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
