"""Small random models of an architecture, on which it is studied without reading a weight."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from quantine.errors import FamilyError, cut

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

AS_IT_IS: Final = 2**31
"""Largest value of fields that are no sizes, although they are called like some."""
SIZES: Final[tuple[tuple[str, int], ...]] = (
    (r"type_vocab|(prompt|segment)_types|divisible|ngram|bucket", AS_IT_IS),
    (r"vocab", 320),
    (r"codebook_size", 256),
    (r"topk_group|n_groups?$|expert_group", 1),
    (r"(n|num)_shared_?experts|num_shared", 1),
    (r"experts_per|top_?k|^moe_k$", 2),
    (r"num_.*experts|n_.*experts|experts?_num|zero_expert|moe_num", 4),
    (r"kv_n_heads|n_head_kv|(kv|key_value|key)_heads", 2),
    (r"(num|n)_.*heads?$|n_head$|(attention|linear)_heads$|_n_heads$|^num_heads$", 4),
    (r"qk_head_dim", 32),
    (r"head_?dim|head_size|kv_channels|dim_head|d_head|d_kv|rotary_dim", 16),
    (r"intermediate|ffn|d_inner|dim_ff|dff|ff_dim|feed_forward|n_inner|_d_ssm|expansion", 128),
    (r"rank$|_rank_|lowrank|bottleneck|router_hidden", 32),
    (r"state_size|d_state", 16),
    (r"hidden|d_model|n_embd|dim_model|emb(ed)?_dim|embedding_(dim|size)|_width|proj_dim", 64),
    (r"max_position|n_positions|n_ctx|max_seq|context_length|max_(source|target)", 512),
)
"""What fields of sizes are called, as patterns, and the most that they are in a small model. The
first pattern that is found in a name counts."""
BLOCKS: Final = re.compile(r"hidden_layers$|n_layers?$|num_layers$|coder_layers$|num_blocks$")
"""What fields with numbers of blocks are called."""
DENSE: Final = frozenset({"first_k_dense_replace", "num_dense_layers"})
"""Fields that say how many of the first blocks have no experts; one of these is enough."""
ROTARY: Final = (
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "llama_4_scaling_beta",
)
"""Parameters of rotary embeddings that do not belong to a way of scaling them."""
SINGLE_BLOCKS: Final = "_heterogeneity_spec"
"""Attribute of configurations that say something of single blocks by their numbers."""
TOKEN: Final = re.compile(r"_token_id$|_token_ids$|^(pad|bos|eos|unk)_index$")
"""What fields that name tokens are called; they are cut to the last token of a small vocabulary."""
LAST_TOKEN: Final = 319
"""Number of the last token of a small vocabulary."""
FEW_PARAMETERS: Final = 2_000_000
"""Parameters up to which a model is small as it is."""
MOST_PARAMETERS: Final = 30_000_000
"""Most parameters of a small model."""


def small_config(config: PretrainedConfig, blocks: int | None = None) -> PretrainedConfig:
    """A copy of a configuration with its sizes cut down.

    What kind of block stands where stays. Scaled rotary embeddings become plain ones, as their
    lists of factors have sizes, too.

    Args:
        config: the configuration of a model in transformers, which is not changed.
        blocks: most blocks of the model, with one of each kind among them as far as there is room;
            ``None`` leaves their number.
    """
    small = copy.deepcopy(config)
    _cut(vars(small), blocks)
    return small


def _cut(fields: dict[str, Any], blocks: int | None) -> None:
    from transformers import PretrainedConfig

    if blocks is not None:
        _cut_blocks(fields, blocks)
    before = dict(fields)
    for key, value in before.items():
        if isinstance(value, PretrainedConfig):
            _cut(vars(value), blocks)
        elif isinstance(value, dict):
            fields[key] = _plain_rotary(value) if str(key).startswith("rope_") else value
            _cut(fields[key], blocks)
        elif TOKEN.search(str(key)):
            fields[key] = _token(value)
        else:
            fields[key] = _smaller(str(key), value)
    _keep_relations(before, fields)


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_smaller(name, one) for one in value]
    if type(value) is not int or BLOCKS.search(name):
        return value
    most = next((most for pattern, most in SIZES if re.search(pattern, name)), AS_IT_IS)
    return min(value, most)


def _token(value: Any) -> Any:
    if isinstance(value, list):
        return [_token(one) for one in value]
    return min(value, LAST_TOKEN) if type(value) is int else value


def _plain_rotary(value: dict[str, Any]) -> dict[str, Any]:
    """Parameters of rotary embeddings without scaling, those of layers of several types included.

    An mrope's sections would have to fill a smaller head: one of the halves is as good as any.
    """
    if any(isinstance(one, dict) for one in value.values()):
        return {k: _plain_rotary(v) if isinstance(v, dict) else v for k, v in value.items()}
    plain: dict[str, Any] = {name: value[name] for name in ROTARY if name in value}
    return {**plain, **({"rope_type": "default"} if "rope_type" in value else {})}


def _keep_relations(before: dict[str, Any], fields: dict[str, Any]) -> None:
    """Give sizes that depend on others the values that the others' new values imply."""
    for queries, keys in (
        ("num_attention_heads", "num_key_value_heads"),
        ("n_heads", "kv_n_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
        ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ):
        if type(before.get(keys)) is int and before.get(keys) == before.get(queries):
            fields[keys] = fields[queries]
    width = fields.get("hidden_size")
    _keep_wide_attention(before, fields)
    for expand, heads, size in (
        ("expand", "num_heads", "head_dim"),
        ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
        ("mamba_expand", "n_mamba_heads", "mamba_headdim"),
    ):
        inner = fields.get("mamba_d_ssm") or fields.get(expand, 0) * (width or 0)
        if inner and type(fields.get(heads)) is int and type(fields.get(size)) is int:
            fields[size] = 16
            fields[heads] = int(inner) // 16


def _keep_wide_attention(before: dict[str, Any], fields: dict[str, Any]) -> None:
    """Leave attention as many times as wide as hidden states as it was, in as many heads."""
    wide, width, heads = (
        before.get(name) for name in ("attention_hidden_size", "hidden_size", "num_attention_heads")
    )
    if type(wide) is int and width and heads and wide % width == 0:
        fields["attention_hidden_size"] = wide // width * fields["hidden_size"]
        if before.get("attention_head_dim") == wide // heads:
            fields["attention_head_dim"] = (
                fields["attention_hidden_size"] // fields["num_attention_heads"]
            )


def _cut_blocks(fields: dict[str, Any], blocks: int) -> None:
    """Leave ``blocks`` blocks, the first of each kind among them, and what lists say of them."""
    counts = {key: value for key, value in fields.items() if BLOCKS.search(str(key))}
    count = max((value for value in counts.values() if type(value) is int), default=0)
    if count <= blocks or SINGLE_BLOCKS in fields:
        return
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == count}
    kinds = [str([one[index] for one in lists.values()]) for index in range(count)]
    first = [index for index in range(count) if kinds.index(kinds[index]) == index][:blocks]
    others = [index for index in range(count) if index not in first]
    chosen = sorted(first + others[: blocks - len(first)])
    for key, value in lists.items():
        fields[key] = [value[index] for index in chosen]
    for key, value in counts.items():
        fields[key] = min(value, blocks) if type(value) is int else value
    for key in DENSE.intersection(fields):
        fields[key] = min(fields[key] or 0, 1)


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """A small random causal language model like that of ``config``, in float32, for evaluation.

    Random generators of the process are as before afterwards.

    Raises:
        FamilyError: none can be built.
    """
    try:
        with own_generators():
            if _parameters(config) > FEW_PARAMETERS:
                config = small_config(config)
            if _parameters(config) > MOST_PARAMETERS:
                raise FamilyError("it is large even after the sizes that are known were cut")
            with torch.device("cpu"):
                model = _from_config(config)
        model.eval()
        return model
    except (MemoryError, FamilyError):
        raise
    except Exception as error:  # whatever an architecture raises where sizes do not fit together
        raise FamilyError(f"no small model can be built: {cut(repr(error), 240)}") from error


def _parameters(config: PretrainedConfig) -> int:
    return sum(parameter.numel() for parameter in bare_model(config).parameters())


def bare_model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of ``config``, with weights on the meta device."""
    with torch.device("meta"):
        return _from_config(config)


def _from_config(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)  # which the model marks with its dtype
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        own, dtype=torch.float32, trust_remote_code=False
    )
    return model


def randomize(model: PreTrainedModel) -> None:
    """Give every parameter random values in the size of what it has, so that nothing is equal."""
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(
            parameter.shape, generator=generator, dtype=parameter.dtype, device="cpu"
        )
        if parameter.ndim == 2:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        else:
            parameter.mul_(1 + 0.1 * noise).add_(0.02 * noise)


@contextmanager
def own_generators() -> Iterator[None]:
    """A context with fresh random generators, after which the caller's are as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
