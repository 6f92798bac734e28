"""A model that continues the prompts of several clients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import torch
from torch import Tensor

from quantine.core.device import device_named
from quantine.errors import PlanError, QuantineError
from quantine.runtime.continuation import Continuation, Made, advance
from quantine.runtime.decoder import Batch, Decoder
from quantine.runtime.generate import ModuleDecoder, batch_on, decoder_on, end_tokens
from quantine.runtime.generate_texts import TOGETHER
from quantine.runtime.graph_decoder import StaticDecoder
from quantine.runtime.load import load_model
from quantine.runtime.prompt import conversation_ids, text_ids
from quantine.server.refusal import Refusal
from quantine.server.requests import TEXT_TOKENS, Conversation, Request
from quantine.source.locate import locate

CONTEXT: Final = 4096
"""Tokens of prompt and answer at most, where nobody says and the model has room for them."""
PLACES: Final = 4
"""Texts that are continued together at most, where nobody says."""


class Engine:
    """A model, its tokenizer, and decoders with room for one text each.

    `advance` may run in one thread at a time, `prompt_ids` in several, all else in another one.

    Args:
        model: as for `quantine.source.locate.locate`.
        context: tokens of prompt and answer at most; ``None`` for those of the model, but no more
            than `CONTEXT`.
        dtype: of activations and of weights that are not quantized.
        device: of the model, by PyTorch's name.
        log: where it is said that no decoder of quantine's is used, if none is.
        places: texts that are continued together at most. Where the model decodes by a CUDA graph,
            it is one text at a time, whatever is asked.

    Attributes:
        name: of the model: its directory's, or its hub id.
        context: tokens of prompt and answer at most.
        tokenizer: of transformers.
        places: number of texts that are continued together at most.

    Raises:
        BackendUnavailable: there is no such device.
        CheckpointError, FormatError: the model cannot be read.
        PlanError: the model has no room for ``context`` tokens, or ``places`` is out of range.
    """

    def __init__(
        self,
        model: str | Path,
        context: int | None,
        dtype: torch.dtype,
        device: str | torch.device,
        log: IO[str],
        places: int = PLACES,
    ) -> None:
        if not 1 <= places <= TOGETHER:
            raise PlanError(f"texts at once must be from 1 to {TOGETHER}, not {places}")
        where = device_named(device)
        source = locate(model)
        config = source.config().get_text_config()
        self.context = _context(context, getattr(config, "max_position_embeddings", None))
        self.tokenizer = source.tokenizer()
        self.tokenizer("a")  # tokenizers set themselves up with their first text, and not later
        self.name = os.path.basename(os.path.abspath(model)) if Path(model).exists() else str(model)
        self._vocabulary: int = config.vocab_size
        self._model = load_model(source, dtype, where)
        self._ends = end_tokens(self._model)
        self._batch: Batch | None = None
        self._decoders: Sequence[Decoder | StaticDecoder | ModuleDecoder]
        if where.type == "cuda":
            graph = decoder_on(self._model, self.context, log)
        else:
            graph, self._batch = None, batch_on(self._model, self.context, places, log)
        if self._batch is not None:
            self._decoders = self._batch.texts
        elif graph is not None:
            self._decoders = [graph]
        else:
            self._decoders = [ModuleDecoder(self._model) for _ in range(places)]
        self.places = len(self._decoders)

    def prompt_ids(self, request: Request) -> Tensor:
        """Token ids ``[1, n]`` int64 of the prompt of ``request``.

        Raises:
            Refusal: it is no prompt for this model, or leaves no room for an answer.
        """
        chat = isinstance(request.prompt, Conversation)
        param = "messages" if chat else "prompt"
        if chat and not getattr(self.tokenizer, "chat_template", None):
            raise Refusal("this model has no chat template: use /v1/completions", param)
        try:
            ids = self._ids(request)
        except QuantineError as error:
            raise Refusal(str(error), param) from error
        count, asked = ids.shape[1], request.most or 1
        if count + asked > self.context:
            raise Refusal(
                f"{count} tokens in the {param} and {asked} new ones exceed the context of "
                f"{self.context}: shorten it or ask for fewer; the server's --context sets it",
                param,
                "context_length_exceeded",
            )
        return ids

    def _ids(self, request: Request) -> Tensor:
        prompt = request.prompt
        if isinstance(prompt, str):
            return text_ids(self.tokenizer, prompt, self._vocabulary)
        if isinstance(prompt, Conversation):
            return conversation_ids(self.tokenizer, prompt.messages, self._vocabulary)
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise PlanError(f"token ids must be below {self._vocabulary}, and not negative")
        return torch.tensor([prompt], dtype=torch.int64, device="cpu")

    def most(self, request: Request, ids: Tensor) -> int:
        """Tokens of the answer to ``request`` at most, whose prompt is ``ids``."""
        room = self.context - ids.shape[1]
        if request.most is not None:
            return request.most
        return room if isinstance(request.prompt, Conversation) else min(TEXT_TOKENS, room)

    def text(self, place: int, request: Request, ids: Tensor) -> Continuation:
        """The answer to ``request``, whose prompt is ``ids``, for `advance` to make.

        Args:
            place: below `places`; a text that was there before must not be advanced any more.
        """
        most = self.most(request, ids)
        decoder = self._decoders[place]
        return Continuation(decoder, place, ids[0], most, request.sampling, self._ends)

    def advance(self, texts: Sequence[Continuation]) -> list[Made]:
        """Make further tokens of each of ``texts``, which have not ended, without end tokens.

        See `quantine.runtime.continuation.advance`.
        """
        return advance(texts, self._batch)


def _context(wanted: int | None, longest: int | None) -> int:
    """Tokens of prompt and answer at most, for a model with room for ``longest``."""
    if wanted is None:
        return min(CONTEXT, longest or CONTEXT)
    if wanted < 2 or wanted > (longest or wanted):
        most = "" if longest is None else f" and at most {longest}, the model's own"
        raise PlanError(f"the context must be at least 2 tokens{most}, not {wanted}")
    return wanted
