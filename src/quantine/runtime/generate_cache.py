"""The KV cache of a call of transformers' ``generate``: packed, where keys and values are rounded.

transformers makes caches of floats. Where the caller leaves the choice to it, or asks for one that
is static, a packed one of the same kind is passed instead.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from quantine.activations.attention import NAME as ATTENTION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNSPECIFIC: Final = (None, "hybrid")
"""Values of ``cache_implementation`` that leave the choice to transformers."""
STATIC: Final = "static"
"""The one that asks for room for all tokens from the beginning."""
NEW_TOKENS: Final = 20
"""Tokens that transformers makes where nobody says how many."""


def with_cache(
    model: PreTrainedModel, args: Sequence[Any], options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call with a packed KV cache among them, where nothing speaks against it.

    The model must round keys and values anyway, and the caller must not have chosen another cache,
    or none.

    Args:
        model: the model whose ``generate`` is called.
        args: its positional arguments: the prompt, if that is one.
        options: its other arguments; they stay as they are.
    """
    from quantine.runtime.kv_cache import has_centred_keys, packed_cache, static_cache

    call = _Call(model, args, options)
    if model.config._attn_implementation != ATTENTION or call.setting("use_cache") is False:
        return options
    kind = call.setting("cache_implementation")
    if options.get("past_key_values") is not None or kind not in (*UNSPECIFIC, STATIC):
        return options
    if call.hides() and has_centred_keys(model):  # positions do not begin with the cache
        return options
    if kind != STATIC:
        cache = packed_cache(model)
        return options if cache is None else {**options, "past_key_values": cache}
    room = call.room()
    if room is None or call.guesses() or packed_cache(model) is None:
        return options
    return {**call.without("cache_implementation"), "past_key_values": static_cache(model, room)}


class _Call:
    """What a call of ``generate`` says, by itself, by its settings, or by those of the model."""

    def __init__(
        self, model: PreTrainedModel, args: Sequence[Any], options: dict[str, Any]
    ) -> None:
        self._options = options
        self._settings = options.get("generation_config"), model.generation_config
        self._prompt = args[0] if args else options.get("inputs", options.get("input_ids"))

    def setting(self, name: str) -> Any:
        """A setting; ``None`` if nobody says."""
        said = [self._options.get(name), *(getattr(held, name, None) for held in self._settings)]
        return next((value for value in said if value is not None), None)

    def hides(self) -> bool:
        """Whether tokens of the prompt may be hidden, as padding is.

        Without a mask, transformers takes tokens of the prompt for padding that look like it.
        """
        mask, padding = self._options.get("attention_mask"), self.setting("pad_token_id")
        if isinstance(mask, Tensor):
            return not bool(mask.bool().all())
        ends = self.setting("eos_token_id")
        ends = ends if isinstance(ends, Sequence) else [ends]
        if padding is None or padding in ends or not isinstance(self._prompt, Tensor):
            return False  # then transformers takes none for padding
        return bool((self._prompt == padding).any())

    def guesses(self) -> bool:
        """Whether tokens are guessed and taken back, which no static cache can do."""
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        return any(self.setting(name) is not None for name in names)

    def without(self, name: str) -> dict[str, Any]:
        """The arguments without a setting, which is not taken from the model's settings either."""
        found = {key: value for key, value in self._options.items() if key != name}
        given, own = self._settings
        if given is not None:
            found["generation_config"] = given = copy.deepcopy(given)
            setattr(given, name, None)
        # What nobody says is the model's own; transformers dislikes both ways of saying things.
        if getattr(own, name, None) is not None:
            found[name] = None
        return found

    def room(self) -> int | None:
        """Tokens of prompt and answer at most; ``None`` where the prompt is no tensor of ids."""
        if not isinstance(self._prompt, Tensor):
            return None
        length = self._prompt.shape[1]
        new, most = self.setting("max_new_tokens"), self.setting("max_length")
        if new is None and most is None:
            new = NEW_TOKENS
        # Both together, as transformers has it: new tokens count. What is too large costs memory.
        asked: int = most if new is None else length + new
        return max(asked, length + 1, self.setting("max_cache_len") or 0)
