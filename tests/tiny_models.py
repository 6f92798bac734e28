"""Tiny random models of every supported architecture, and an oracle for what quantine wrote.

Every matrix is rounded to float16, so that the part of a model that quantine keeps in 16 bit is
kept without loss: the quantized weights are then all that differs from the float model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

VOCAB = 300
WIDTH = 64
CONTEXT = 128
BOS, EOS = 256, 257
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
LEVELS = [(bits, sym) for bits in range(2, 9) for sym in (False, True)]
"""Every width of a code, on an asymmetric and on a symmetric grid."""

SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}
ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    **SPECIAL,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "ffn_dim": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "word_embed_proj_dim": WIDTH,
    **SPECIAL,
    "pad_token_id": 1,
}
NEOX = {**ROPE, "hidden_act": "gelu", "rotary_pct": 0.5}
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    **SPECIAL,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**ROPE, "num_hidden_layers": 2, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {**ROPE, "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**ROPE, "num_hidden_layers": 2, "sliding_window": 16}),
    "qwen2": ("qwen2", {**ROPE, "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**ROPE, "num_hidden_layers": 2, "head_dim": 32}),
    "smollm3": ("smollm3", {**ROPE, "num_hidden_layers": 2, "no_rope_layer_interval": 2}),
    "phi3": ("phi3", {**ROPE, "num_hidden_layers": 4}),
    "gemma2": (
        "gemma2",
        {**ROPE, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 16, "pad_token_id": 0},
    ),
    "gemma3": (
        "gemma3_text",
        {**ROPE, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 16, "pad_token_id": 0},
    ),
    "opt": ("opt", {**OPT, "num_hidden_layers": 3}),
    "opt_projected": (
        "opt",
        {**OPT, "num_hidden_layers": 3, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "neox_parallel": ("gpt_neox", {**NEOX, "num_hidden_layers": 4, "use_parallel_residual": True}),
    "neox_sequential": (
        "gpt_neox",
        {**NEOX, "num_hidden_layers": 4, "use_parallel_residual": False},
    ),
    "falcon_old": (
        "falcon",
        {**FALCON, "num_hidden_layers": 4, "multi_query": True, "new_decoder_architecture": False},
    ),
    "falcon_new": (
        "falcon",
        {**FALCON, "num_hidden_layers": 4, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_alibi": (
        "falcon",
        {
            **FALCON,
            "num_hidden_layers": 4,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "bloom": (
        "bloom",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 4, "n_head": 4, **SPECIAL},
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT}
        | SPECIAL,
    ),
}
"""Model type and configuration of every variant; each has at least as many matrices in its blocks
as there are `LEVELS`."""


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a variant in `FAMILIES`, with ``changes``."""
    kind, values = FAMILIES[name]
    return transformers.AutoConfig.for_model(kind, **{**values, **changes})


def build(config: PretrainedConfig, directory: Path, *, bos: bool = True, seed: int = 0) -> Path:
    """Save a random model of ``config``, in float32, with a tokenizer."""
    random_model(config, seed).save_pretrained(directory)
    byte_tokenizer(bos=bos).save_pretrained(directory)
    return directory


def loud_states(directory: Path) -> Path:
    """A Llama in which some channels of keys and some tokens of values are much louder."""

    def change(attention: Any, generator: torch.Generator) -> None:
        keys, values = attention.k_proj.weight, attention.v_proj.weight
        keys *= torch.logspace(-2, 0.5, 8).repeat(len(keys) // 8).unsqueeze(1)
        along = torch.randn(1, values.shape[1], generator=generator)
        values += torch.randn(len(values), 1, generator=generator) @ along

    return _with_attention("llama", directory, change)


def biased_keys(directory: Path) -> Path:
    """A Qwen2 whose keys, before rotary embeddings, are one large vector and little more."""

    def change(attention: Any, generator: torch.Generator) -> None:
        bias = attention.k_proj.bias
        bias.copy_(torch.randn(bias.shape, generator=generator) * 20)

    return _with_attention("qwen2", directory, change)


@torch.no_grad()
def _with_attention(
    name: str, directory: Path, change: Callable[[Any, torch.Generator], None]
) -> Path:
    """Save a variant in `FAMILIES` whose attention modules were changed, one after another."""
    build(tiny_config(name), directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        change(block.self_attn, generator)
    model.save_pretrained(directory)
    return directory


def random_model(config: PretrainedConfig, seed: int = 0) -> Any:
    """A model whose logits spread over several nats, so that a wrong weight shows.

    It is the same whatever the caller's default dtype and device are: the first test that needs a
    tiny model builds it for all others.
    """
    with torch.random.fork_rng(), torch.device("cpu"):
        attention = bounded_attention(config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    generator = torch.Generator("cpu").manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            if parameter.ndim >= 2:
                value = noise * 1.5 / math.sqrt(parameter.shape[-1])
            elif name == "bias":
                value = noise * 0.1
            else:
                value = parameter.detach() + noise * 0.1
            parameter.data = value.half().float()
    return model


def bounded_attention(config: PretrainedConfig) -> dict[str, str]:
    """Options for models whose scores have a bound, without which transformers 5.19 attends."""
    bounded = getattr(config, "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if bounded else {}


def byte_tokenizer(*, bos: bool = True, extra: int = 0) -> PreTrainedTokenizerFast:
    """One token per byte, ``<s>`` and ``</s>``, and ``extra`` words with ids of their own.

    Args:
        bos: put ``<s>`` before every text.
    """
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([f"[word {index}]" for index in range(extra)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=10**9
    )


def mixed_rules(layers: Sequence[str], **gptq: Any) -> list[dict[str, Any]]:
    """Rules that give every layer its own level: over all of them, every one of `LEVELS` occurs.

    Every third layer is solved by GPTQ with ``gptq`` parameters, the others are rounded.
    """
    rules = []
    for index, name in enumerate(layers):
        bits, sym = LEVELS[index % len(LEVELS)]
        scheme = {"match": name, "bits": bits, "sym": sym, "group_size": (16, 32, -1)[index % 3]}
        if index % 3 == 0 and gptq:
            scheme |= {"method": "gptq", **gptq}
        else:
            scheme["method"] = "rtn"
        rules.append(scheme)
    return rules


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the weight files of a directory."""
    tensors = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return tensors


def oracle_weights(directory: Path) -> dict[str, Tensor]:
    """The float32 matrices a quantized directory stands for, read as slowly as it is plain."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors = stored_tensors(directory)
    found = {}
    for name, layer in config["layers"].items():
        scheme, (rows, columns) = config["schemes"][layer["scheme"]], layer["shape"]
        part = {
            key: tensors[f"{name}.{key}"]
            for key in ("codes", "scale", "zero", "in_perm")
            if f"{name}.{key}" in tensors
        }
        found[name] = _oracle_weight(part, scheme, rows, columns)
    return found


def _oracle_weight(
    part: Mapping[str, Tensor], scheme: Mapping[str, Any], rows: int, columns: int
) -> Tensor:
    bits = scheme["bits"]
    length = columns if scheme["group_size"] == -1 else scheme["group_size"]
    codes = np.stack([_numbers(row, bits, columns) for row in part["codes"].numpy()])
    if scheme["sym"]:
        zeros = np.full((rows, columns // length), 2 ** (bits - 1))
    else:
        zeros = _numbers(part["zero"].numpy(), bits, rows * columns // length).reshape(rows, -1)
    scales = part["scale"].numpy().astype(np.float32)
    values = (codes - zeros.repeat(length, 1)) * scales.repeat(length, 1)
    weight = np.empty((rows, columns), np.float32)
    weight[:, part["in_perm"].numpy() if "in_perm" in part else np.arange(columns)] = values
    return torch.from_numpy(weight)


def _numbers(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """``count`` numbers of ``bits`` bits, the lowest bit of the lowest byte first."""
    digits = np.unpackbits(stream, bitorder="little")[: count * bits].reshape(count, bits)
    return digits.astype(np.int64) @ (2 ** np.arange(bits))


def with_weights(
    directory: Path, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Any:
    """The float model of ``directory`` with the matrices ``weights`` ``[out, in]`` in it."""
    attention = bounded_attention(transformers.AutoConfig.from_pretrained(directory))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **attention).eval()
    for name, weight in weights.items():
        module = model.get_submodule(name)
        stored = weight.T if type(module).__name__ == "Conv1D" else weight
        assert module.weight.shape == stored.shape
        module.weight = nn.Parameter(stored.to(dtype).contiguous(), requires_grad=False)
    return model


def some_tokens(count: int = 40, batch: int = 2, seed: int = 5) -> Tensor:
    """Token ids ``[batch, count]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, BOS, (batch, count), generator=generator)


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor | None = None) -> Tensor:
    """Logits of ``tokens``, `some_tokens` if ``None``."""
    logits: Tensor = model(input_ids=some_tokens() if tokens is None else tokens).logits
    return logits


def matrices_of(directory: Path) -> list[str]:
    """Names of the matrices a plan for ``@blocks`` has to find, told from the modules alone.

    Those are the linear maps inside of numbered submodules.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and any(part.isdigit() for part in name.split("."))
    ]


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
