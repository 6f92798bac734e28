"""The KV cache of transformers' own ``generate``, packed where the model rounds keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from quantine.activations.attention import NAME as ATTENTION
from quantine.errors import BackendUnavailable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHES: Final = ("past_key_values", "cache_implementation")
"""Arguments of ``generate`` that choose a KV cache."""
UNSPECIFIC: Final = (None, "hybrid")
"""Values of ``cache_implementation`` in a configuration that leave the choice to transformers."""
STATIC: Final = "static"
"""Value of ``cache_implementation`` that asks for memory that never moves."""
OF_THE_LOOP: Final = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "synced_gpus",
    "tokenizer",
)
"""Arguments of ``generate`` that transformers does not hand to a loop of somebody else."""


def with_packed_cache(
    model: PreTrainedModel, config: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments ``options`` of ``generate`` with a packed KV cache, where nothing forbids it.

    The model must round keys and values anyway, and the caller must not have chosen a cache, or
    none.

    Args:
        model: the model.
        config: the argument ``generation_config``, or ``None``.
        options: all other arguments by name.
    """
    from quantine.runtime.kv_cache import packed_cache

    if model.config._attn_implementation != ATTENTION:
        return options
    configs = (model.generation_config, config)
    asked = any(options.get(name) is not None for name in CACHES)
    for config in configs:
        asked |= getattr(config, "cache_implementation", None) not in UNSPECIFIC
    uses = [getattr(config, "use_cache", None) for config in configs]
    if asked or False in (options.get("use_cache"), *uses):
        return options
    cache = packed_cache(model)
    return options if cache is None else {**options, "past_key_values": cache}


def asks_for_static(model: PreTrainedModel, config: Any, options: dict[str, Any]) -> bool:
    """Whether a call of ``generate`` asks for a static cache, and a packed one can be had.

    Args:
        model, config, options: as for `with_packed_cache`.
    """
    from quantine.runtime.kv_cache import packed_cache

    if model.config._attn_implementation != ATTENTION:
        return False
    named = options.get("cache_implementation")
    for each in (config, model.generation_config):  # what comes first counts
        named = named or getattr(each, "cache_implementation", None)
    return named == STATIC and packed_cache(model) is not None


class StaticLoop:
    """The loop of transformers over tokens, with a packed static cache in place of a float one.

    transformers prepares everything and calls this loop, its argument ``custom_generate``, which
    runs that of the decoding method. The float cache that it brings along has no memory yet.

    Args:
        streamer: gets the prompt, and tokens as they are made; or ``None``.
        options: arguments of ``generate``.

    Raises:
        BackendUnavailable: there are arguments that such a loop does not get.
    """

    def __init__(self, streamer: Any, options: dict[str, Any]) -> None:
        self._streamer = streamer
        for name in OF_THE_LOOP:
            if options.get(name) not in (None, False):
                raise _refusal(name)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Any:
        """Generate tokens; transformers calls it with everything prepared.

        Raises:
            BackendUnavailable: transformers has no loop of its own for the decoding method.
        """
        from transformers.generation.configuration_utils import GenerationMode

        from quantine.runtime.kv_cache import static_cache

        loops = {
            GenerationMode.GREEDY_SEARCH: "_sample",
            GenerationMode.SAMPLE: "_sample",
            GenerationMode.BEAM_SEARCH: "_beam_search",
            GenerationMode.BEAM_SAMPLE: "_beam_search",
        }
        mode = generation_config.get_generation_mode()
        if mode not in loops:
            raise _refusal(mode.value)
        embedded = inputs.get("inputs_embeds")  # tokens that `max_length` does not count
        room = generation_config.max_length + (0 if embedded is None else embedded.shape[1])
        wanted = getattr(generation_config, "max_cache_len", None) or room
        inputs["past_key_values"] = static_cache(model, max(room, wanted))
        if self._streamer is not None:
            if loops[mode] != "_sample":
                raise _refusal("a streamer and beams")
            inputs["streamer"] = self._streamer
            self._streamer.put(input_ids.cpu())
        prepared = input_ids, logits_processor, stopping_criteria, generation_config
        return getattr(type(model), loops[mode])(model, *prepared, **inputs)


def _refusal(name: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"generate with {name} would keep keys and values as floats where cache_implementation is "
        f"{STATIC!r}: pass past_key_values=quantine.runtime.kv_cache.static_cache(model, tokens) "
        "instead, or leave cache_implementation out"
    )
