"""A llama type model in widths that are multiples of 256, with the same function.

    python benchmarks/widened.py demo OUT

llama.cpp's types with a K need rows of 256 inputs. Channels and heads that are added hold zeros;
norms make up for the mean of squares being taken over more channels.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantine.runtime.load import load_model
from quantine.source.locate import locate

WIDTH: Final = 256


def main() -> None:
    """Write the wider model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    source = locate(arguments.model)
    model = load_model(source, torch.float32)
    wider = widened(model)
    ids = torch.arange(64)[None] * 37 % model.config.vocab_size
    with torch.no_grad():
        apart = (model(ids).logits - wider(ids).logits).abs().max()
    assert apart < 1e-3, f"logits are {apart} apart"
    wider.save_pretrained(arguments.out)
    source.tokenizer().save_pretrained(arguments.out)


def widened(model: Any) -> Any:
    """The same function, with ``hidden_size`` and ``intermediate_size`` rounded up."""
    narrow = model.config
    config = type(narrow)(**narrow.to_dict())
    config.hidden_size, config.intermediate_size = (
        -(-size // WIDTH) * WIDTH for size in (narrow.hidden_size, narrow.intermediate_size)
    )
    heads = narrow.num_attention_heads // narrow.num_key_value_heads
    config.head_dim = narrow.hidden_size // narrow.num_attention_heads
    config.num_attention_heads = config.hidden_size // config.head_dim
    config.num_key_value_heads = config.num_attention_heads // heads
    share = narrow.hidden_size / config.hidden_size
    config.rms_norm_eps = narrow.rms_norm_eps * share
    wider = AutoModelForCausalLM.from_config(config).float().eval()
    wider.load_state_dict(
        {
            name: padded(weight * (math.sqrt(share) if "norm" in name else 1.0), like)
            for (name, weight), like in zip(
                model.state_dict().items(), wider.state_dict().values(), strict=True
            )
        }
    )
    return wider


def padded(weight: Tensor, like: Tensor) -> Tensor:
    """``weight`` in the first places of zeros as large as ``like``."""
    result = torch.zeros_like(like)
    result[tuple(slice(size) for size in weight.shape)] = weight
    return result


if __name__ == "__main__":
    main()
