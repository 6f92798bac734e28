"""GGUF files of tiny models, written as llama.cpp's converter does it, with metadata to spoil."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig

from tiny_models import BOS, EOS, byte_tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "falcon": "falcon",
    "bloom": "bloom",
    "gpt2": "gpt2",
}
"""What llama.cpp calls the model types that quantine reads from GGUF files."""
MODELS = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "falcon_old", "falcon_new"),
    *("bloom", "gpt2"),
)
"""Tiny models of these types, by their names in `tiny_models`."""

SENTENCEPIECE = "SentencePiece"
"""Stands for the kind of tokenizers that llama.cpp calls ``llama``, which have no such name."""
OWN_WAYS = {
    **dict.fromkeys(("qwen2", "qwen3"), "qwen2"),
    **dict.fromkeys(("gemma2", "gemma3_text"), SENTENCEPIECE),
}
"""How the tokenizers of some model types split text."""


def write_gguf(
    path: Path,
    model: Any,
    *,
    changes: Mapping[str, Any] | None = None,
    left_out: Callable[[str], bool] = lambda _: False,
    added: Mapping[str, Tensor] | None = None,
    kind: gguf.GGMLQuantizationType | None = None,
    pre: str | None = None,
    bos: int = BOS,
    backend: Tokenizer | None = None,
) -> Path:
    """Write the weights of ``model``.

    Args:
        path: of the file.
        model: a model of a type in `ARCHITECTURES`.
        changes: further metadata, or other values, without the prefix; ``None`` removes one. Keys
            that begin with a dot are taken without any prefix.
        left_out: says of llama.cpp's names which tensors are not written.
        added: further tensors, by llama.cpp's names.
        kind: type of ggml for matrices; ``None`` is float32.
        pre: llama.cpp's name for the way in which the tokenizer splits text; ``None`` is one that
            its class has.
        bos: number of the token at the beginning of texts; from 259 on they have a space in them,
            which the alphabet of bytes has not.
        backend: whose words and merges the file has, with one token at both ends of texts;
            ``None`` is one of bytes.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(str(path), architecture)
    plain = {k[1:]: v for k, v in (changes or {}).items() if k.startswith(".")}
    own = {**metadata_of(model.config), **(changes or {})}
    own = {f"{architecture}.{k}": v for k, v in own.items() if not k.startswith(".")}
    for key, value in {**own, **plain}.items():
        _add(writer, key, value)
    pre = pre or OWN_WAYS.get(model.config.model_type, "gpt-2")
    _add_tokenizer(writer, model.config.vocab_size, pre, bos, backend)
    for name, tensor in {**stored_tensors(model), **(added or {})}.items():
        if left_out(name):
            continue
        data = tensor.detach().contiguous().numpy()
        if kind is None or tensor.ndim < 2:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(config: PretrainedConfig) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config, without the architecture's prefix."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        groups = 1 if config.multi_query else heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", None)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 128),
        "embedding_length": config.hidden_size,
        "feed_forward_length": inner or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
    }
    if config.model_type in {"falcon", "bloom", "gpt2"}:
        return values | {"attention.layer_norm_epsilon": float(config.layer_norm_epsilon)}
    values["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    if config.model_type != "phi3":
        values |= {"attention.key_length": head, "attention.value_length": head}
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    values["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    values["rope.freq_base"] = float(rope["rope_theta"])
    if config.model_type in {"gemma2", "gemma3_text", "phi3"} and config.sliding_window:
        values["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """The weights of ``model`` by llama.cpp's names, in the order of rows that it needs."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    code = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(code, config.num_hidden_layers)
    tied = set() if not config.tie_word_embeddings else {"lm_head.weight"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        # Names of Bloom are listed without the prefix of its base model.
        bare = name.removeprefix("transformer.") if config.model_type == "bloom" else name
        stored = names.get_name(bare, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = _arranged(stored, tensor.detach(), config)
    return tensors


def _arranged(stored: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    if config.model_type == "llama" and (".attn_q." in stored or ".attn_k." in stored):
        halves = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    if config.model_type in {"gemma2", "gemma3_text"} and stored.endswith("norm.weight"):
        return tensor + 1
    if config.model_type == "gpt2" and stored.startswith("blk.") and tensor.ndim == 2:
        return tensor.T
    if config.model_type == "bloom" and ".attn_qkv." in stored:
        heads = tensor.reshape(config.n_head, 3, -1, *tensor.shape[1:])
        return heads.transpose(0, 1).reshape(tensor.shape)
    return tensor


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _add_tokenizer(
    writer: gguf.GGUFWriter, size: int, pre: str, bos: int, backend: Tokenizer | None
) -> None:
    kinds, merges = [1] * size, ["h e"]
    if backend is None:
        words = byte_tokenizer().get_vocab()
        words["he"] = len(words)
    else:
        words = backend.get_vocab()
        merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
        for number in backend.get_added_tokens_decoder():
            kinds[number] = 3
    if pre == SENTENCEPIECE:
        words["<unk>"] = len(words)
    tokens = sorted(words, key=words.__getitem__)
    tokens += [f"[pad {index}]" for index in range(size - len(tokens))]
    if pre == SENTENCEPIECE:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(EOS if backend is None else bos)


def divergence(expected: Any, found: Any, tokens: int = 60) -> float:
    """Largest difference between the logits of two models."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 256, (2, tokens), generator=generator)
    with torch.no_grad():
        return float((expected(ids).logits - found(ids).logits).abs().max())
