"""Write a sharded random checkpoint of any shape, for runs where only sizes and time matter.

    python benchmarks/make_synthetic.py llama-70b shape --set num_hidden_layers=4

A tensor is made and written some rows at a time, so memory stays small whatever the model's size.
A few inputs of each matrix, and a few single weights, are much larger than the others, as in real
models. The tokenizer has a token for each byte.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from quantine.formats.headers import Entry
from quantine.formats.shards import index_of, laid_out, write_atomically
from quantine.source.weight_files import INDEX

SHARD_BYTES: Final = 4_000_000_000
"""Largest size of one weight file, in bytes, unless one tensor is larger."""
CHUNK: Final = 2**24
"""Numbers that are made at once, and so are in memory."""
LOUD_INPUTS: Final = 0.004
"""Share of the inputs of a matrix whose weights are all larger, at least one."""
LOUD_WEIGHTS: Final = 0.0005
"""Share of single weights that are larger."""
LOUD: Final = 8.0
"""How many times larger these are."""
VOCABULARY: Final = {"vocab_size": 32000, "bos_token_id": 256, "eos_token_id": 257}
LLAMA: Final = {**VOCABULARY, "max_position_embeddings": 4096}


def _llama(width: int, inner: int, blocks: int, heads: int, of_keys: int) -> dict[str, Any]:
    return {
        **LLAMA,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": of_keys,
        "tie_word_embeddings": False,
    }


SHAPES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama-1b": ("llama", _llama(2048, 8192, 16, 32, 8)),
    "llama-7b": ("llama", _llama(4096, 11008, 32, 32, 32)),
    "llama-13b": ("llama", _llama(5120, 13824, 40, 40, 40)),
    "llama-70b": ("llama", _llama(8192, 28672, 80, 64, 8)),
    "llama-405b": ("llama", _llama(16384, 53248, 126, 128, 8)),
    "qwen3-moe-30b": (
        "qwen3_moe",
        {
            **_llama(2048, 6144, 48, 32, 4),
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    "opt-6.7b": (
        "opt",
        {
            **VOCABULARY,
            "hidden_size": 4096,
            "word_embed_proj_dim": 4096,
            "ffn_dim": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
}
"""Model type and configuration by name."""


def write_checkpoint(
    shape: str,
    out: Path,
    changes: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
) -> None:
    """Write a random model in bfloat16, in the layout of published checkpoints.

    Args:
        shape: a name in `SHAPES`.
        out: directory to make.
        changes: fields of the configuration that are other than those of the shape.
        shard_bytes: largest size of one weight file.
        seed: of all weights; each tensor's also depend on its name.
    """
    kind, fields = SHAPES[shape]
    config = AutoConfig.for_model(kind, **{**fields, **(changes or {})})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    out.mkdir(parents=True)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    config.save_pretrained(out)
    _byte_tokenizer().save_pretrained(out)
    shards = _divided(list(_entries(model)), shard_bytes)
    for name, entries in shards.items():
        start, ordered = laid_out(entries)
        with (out / name).open("wb") as file:
            file.write(start)
            for entry in ordered:
                _write_tensor(entry, file, seed)
    write_atomically(out / INDEX, index_of(shards))


def _entries(model: Any) -> Iterator[Entry]:
    """The tensors that a published checkpoint of ``model`` has: experts are not fused there."""
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if name in tied:
            continue
        if path.endswith(".experts") and tensor.ndim == 3:
            leaves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
            rows = tensor.shape[1] // len(leaves)
            for expert in range(tensor.shape[0]):
                for part in leaves:
                    yield _entry(f"{path}.{expert}.{part}.weight", (rows, tensor.shape[2]))
        else:
            yield _entry(name, tuple(tensor.shape))


def _entry(name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(name, "BF16", shape, Path(), 0, 2 * math.prod(shape))


def _divided(entries: list[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
    """The tensors of each file, by its name."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": found
        for number, found in enumerate(shards, 1)
    }


def _write_tensor(entry: Entry, file: BinaryIO, seed: int) -> None:
    """Make a tensor and write it, some rows at a time."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(entry.name.encode()))
    if len(entry.shape) < 2:
        noise = 0.1 * torch.randn(entry.shape, generator=generator)
        _write(noise if entry.name.endswith("bias") else 1 + noise, file)
        return
    rows, columns = entry.shape
    loud = max(1, round(LOUD_INPUTS * columns))
    scales = torch.full((columns,), 1 / math.sqrt(columns))
    scales[torch.randperm(columns, generator=generator)[:loud]] *= LOUD
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        weight = torch.randn(min(step, rows - first), columns, generator=generator) * scales
        single = torch.rand(weight.shape, generator=generator) < LOUD_WEIGHTS
        _write(torch.where(single, weight * LOUD, weight), file)


def _write(tensor: Tensor, file: BinaryIO) -> None:
    file.write(tensor.bfloat16().view(torch.uint8).numpy().data)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, ``<s>`` and ``</s>``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=10**9
    )


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of the configuration, such as num_hidden_layers=4",
    )
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    changes = dict(text.split("=", 1) for text in arguments.set)
    read = {key: yaml.safe_load(value) for key, value in changes.items()}
    write_checkpoint(arguments.shape, arguments.out, read, arguments.shard_bytes, arguments.seed)


if __name__ == "__main__":
    main()
