"""``model.generate`` of quantized models, with the native decoder where it computes the same.

transformers still prepares everything: the settings, and from them the functions that change scores
and those that decide when to stop. Only the loop over tokens is replaced, through transformers'
argument ``custom_generate``. Calls that this loop does not cover are left to transformers.

The native loop computes in float32, whatever the dtype of the model.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from quantine.errors import BackendUnavailable
from quantine.runtime.decoder import Batch, batch_for
from quantine.runtime.decoder_model import check_decodes
from quantine.runtime.generate_cache import with_cache
from quantine.runtime.generate_steps import append_chosen, append_each
from quantine.runtime.model_state import ModelState
from quantine.runtime.prompt_lookup import most_likely_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ELSEWHERE: Final = frozenset(
    {
        "assistant_model",
        "assistant_tokenizer",
        "custom_generate",
        "inputs_embeds",
        "past_key_values",
        "synced_gpus",
        "tokenizer",
    }
)
"""Arguments of ``generate`` that the native loop does not cover."""

UNDERSTOOD: Final = frozenset(
    {"attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}
)
"""Arguments that transformers passes to the loop and that the native decoder can do without."""

OUTPUTS: Final = (
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
)
"""Settings that ask for more results than token ids, which the native loop does not have."""


class _Elsewhere(Exception):
    """Raised where the native loop does not cover a call, which is then left to transformers.

    Its message is empty where the call asks for something else; else it says what the model has.
    """


class Generate:
    """Takes the place of ``model.generate``.

    A decoder is kept from one call to the next, as long as nothing that it was made from changes.

    Args:
        model: a quantized model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._kept: _Kept | None = None
        self._said = ""

    def __call__(self, *args: Any, streamer: Any = None, **options: Any) -> Any:
        """Generate tokens; arguments and results are those of transformers' ``generate``."""
        ordinary: Any = type(self._model).generate  # type: ignore[attr-defined]
        if len(args) == 2:
            options["generation_config"] = args[1]
            args = args[:1]
        plain = len(args) <= 1 and not any(options.get(name) is not None for name in ELSEWHERE)
        if plain:
            # A call from another thread meanwhile gets a decoder of its own.
            kept, self._kept = self._kept, None
            loop = _Loop(self._model, kept, streamer)
            try:
                loop.check()
                # No streamer for transformers: a call that turns out to go elsewhere begins again.
                return ordinary(self._model, *args, custom_generate=loop, **options)
            except _Elsewhere as reason:
                self._say(str(reason))
            finally:
                self._kept = loop.kept
        options = with_cache(self._model, args, options)
        return ordinary(self._model, *args, streamer=streamer, **options)

    def _say(self, reason: str) -> None:
        if reason and reason != self._said:
            logging.getLogger("quantine").warning(
                "generating with the modules of transformers: %s", reason
            )
            self._said = reason

    def __getstate__(self) -> dict[str, Any]:
        """The state without the decoder: copies make one of their own."""
        return self.__dict__ | {"_kept": None}


class _Kept(NamedTuple):
    """Decoders, and the state of the model that they were made from."""

    batch: Batch
    made_from: ModelState


class _Loop:
    """The native loop over tokens of one call of ``generate``.

    Args:
        model: the model.
        kept: the decoder of an earlier call.
        streamer: gets the prompt, and tokens as they are made; or ``None``.

    Attributes:
        kept: the decoder for later calls.
    """

    def __init__(self, model: PreTrainedModel, kept: _Kept | None, streamer: Any) -> None:
        self._model = model
        self._streamer = streamer
        self.kept = kept

    def check(self) -> None:
        """Forget a decoder that no longer computes what the model does.

        Raises:
            _Elsewhere: no native decoder does; the message says why.
        """
        if self.kept is not None and not self.kept.made_from.holds(self._model):
            self.kept = None  # frees its memory
        try:
            if self.kept is None:
                check_decodes(self._model)
        except BackendUnavailable as error:
            raise _Elsewhere(str(error)) from error

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        """Generate tokens; transformers calls it with everything prepared.

        Raises:
            _Elsewhere: the call asks for something that this loop does not have, or no native
                decoder computes what the model does.
        """
        _check(input_ids, generation_config, inputs)
        prompts = _prompts(input_ids, inputs)
        batch = self._batch(generation_config.max_length, len(prompts))
        streamer = self._streamer or _Nobody()
        streamer.put(input_ids.cpu())
        if len(prompts) == 1 and not generation_config.do_sample and not logits_processor:
            new = generation_config.max_length - input_ids.shape[1]
            chosen = most_likely_tokens(batch.texts[0], prompts[0], new)
            output = append_each(chosen, input_ids, stopping_criteria, streamer)
        else:
            logits = torch.stack(
                [text.append(prompt) for text, prompt in zip(batch.texts, prompts, strict=False)]
            )
            output = append_chosen(
                batch,
                logits,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
            )
        streamer.end()
        return output

    def _batch(self, capacity: int, texts: int) -> Batch:
        """Decoders that have seen no tokens, each with room for ``capacity``, prompt included.

        Errors are those of the call.
        """
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest is not None and capacity > longest:
            raise _Elsewhere  # transformers may end long before, without room for all of it
        if self.kept is None or not self.kept.batch.has_room(capacity, texts):
            self.kept = None  # frees its memory
            try:
                batch = batch_for(self._model, capacity, texts)
            except BackendUnavailable as error:
                raise _Elsewhere(str(error)) from error
            self.kept = _Kept(batch, ModelState(self._model))
        for text in self.kept.batch.texts:
            text.reset()
        return self.kept.batch


def _check(input_ids: Tensor, config: Any, inputs: dict[str, Any]) -> None:
    from transformers.generation.configuration_utils import GenerationMode

    modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    odd = (
        config.get_generation_mode() not in modes
        or input_ids.numel() == 0
        or config.cache_implementation is not None
        or any(getattr(config, name) for name in OUTPUTS)
        or any(value is not None for name, value in inputs.items() if name not in UNDERSTOOD)
        or not inputs.get("use_cache", True)
    )
    if odd:
        raise _Elsewhere


def _prompts(input_ids: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """Each prompt without the padding before it.

    Raises:
        _Elsewhere: tokens are hidden elsewhere, or have other positions than in a text.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None:
        mask = torch.ones_like(input_ids)
    count, padding = input_ids.shape[1], (mask == 0).sum(1, keepdim=True)
    places = torch.arange(count, device=input_ids.device) - padding
    usual = mask.shape == input_ids.shape and torch.equal(mask == 1, places >= 0)
    if not usual or not bool(mask[:, -1].all()):
        raise _Elsewhere
    if positions is not None and not bool((positions == places)[mask == 1].all()):
        raise _Elsewhere
    return [row[int(before) :] for row, before in zip(input_ids, padding, strict=True)]


class _Nobody:
    """A streamer of which nobody hears."""

    def put(self, value: Tensor) -> None:
        """Leave it."""

    def end(self) -> None:
        """Leave it."""
