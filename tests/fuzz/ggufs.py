"""Damaged GGUF files: metadata, infos of tensors and bytes, as far as a run reads them first."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from typing import Final

import gguf
import torch

from fuzz import values
from fuzz.campaign import Target
from quantine import Calibration, Plan
from quantine.run.prepare import prepare
from tiny_models import LETTERS, VOCAB, random_model, tiny_config

OUTSIDE: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NUMBERS: Final = (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
RTN: Final = Plan.preset("rtn", bits=4, group_size=32)


def build_file(root: Path) -> None:
    """A tiny llama as GGUF."""
    config = tiny_config("llama")
    file = gguf.GGUFWriter(str(root / "base.gguf"), "llama")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(10000.0)
    words = [*LETTERS, "<s>", "</s>", "he"]
    words += [f"[pad {index}]" for index in range(VOCAB - len(words))]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(words)
    file.add_token_types([1] * len(words))
    file.add_token_merges(["h e"])
    file.add_bos_token_id(256)
    file.add_eos_token_id(257)
    for name, tensor in random_model(config).state_dict().items():
        file.add_tensor(_stored_name(name), tensor.to(torch.float16).numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _stored_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, block, *path, leaf = name.split(".")
    return f"blk.{block}.{INSIDE['.'.join(path)]}.{leaf}"


def attempt(random: Random, root: Path, place: Path) -> None:
    """Prepare a run on a damaged file: all checks that come before work."""
    data = bytearray((root / "base.gguf").read_bytes())
    file = place.with_suffix(".gguf")
    file.write_bytes(_damaged(random, data))
    try:
        prepare(file, RTN, Calibration(samples=0))
    finally:
        file.unlink()


def _damaged(random: Random, data: bytearray) -> bytes:
    """Data changed in the part that is not weights, most often in a field that is known."""
    end = data.find(b"output.weight") + 200  # of what comes before the tensors' bytes
    kind = random.randrange(4)
    if kind == 0:
        return values.mutated_bytes(random, bytes(data[:end])) + bytes(data[end:])
    if kind == 1:
        return bytes(data[: random.randrange(len(data))])
    marks = (b"llama.", b"tokenizer.", b"blk.", b"general.", b"GGUF", b"token_embd", b"output")
    mark = random.choice(marks)
    places = [at for at in range(end) if data.startswith(mark, at)]
    if not places:
        return bytes(data[: end // 2])
    at = random.choice(places) + random.randrange(64)
    if kind == 2:
        struct.pack_into("<Q", data, at, random.choice(NUMBERS))
    else:
        data[at] = random.randrange(256)
    return bytes(data)


GGUFS: Final = Target("ggufs", 0.1, build_file, attempt)
