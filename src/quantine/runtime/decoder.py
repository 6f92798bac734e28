"""Decoding in C++: one native call for a prompt, and one for each further token or row of tokens.

The native decoder computes what the model's modules in transformers compute. A model for which it
would compute something else is refused, with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantine.core.ambient import own_state
from quantine.core.arithmetic import UNSTATED, Arithmetic
from quantine.errors import BackendUnavailable
from quantine.kernels import backend
from quantine.kernels.threads import pool
from quantine.runtime.decoder_model import arguments_for
from quantine.runtime.modules import INTEGER_ROWS
from quantine.runtime.packed import packed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder:
    """A model together with the tokens it has seen (its KV cache); everything is in float32.

    It shares packed weights with the model it was made from, but copies float weights and settings:
    make another decoder after changing any of them. ``model.generate`` does so by itself, see
    `quantine.runtime.model_state.ModelState`. Threads that use one, or several of a `Batch`, wait
    for each other.

    Args:
        native: a ``quantine._native.Decoder``.
        text: which of its texts this one is.
    """

    def __init__(self, native: Any, text: int = 0) -> None:
        self._native = native
        self._text = text
        self._logits = torch.empty(native.vocabulary, dtype=torch.float32, device="cpu")

    @property
    def position(self) -> int:
        """Number of tokens seen since the last `reset`."""
        return int(self._native.position(self._text))

    @property
    def capacity(self) -> int:
        """Largest number of tokens that can be seen."""
        return int(self._native.capacity)

    def append(self, tokens: Tensor) -> Tensor:
        """Run the model on further tokens.

        Args:
            tokens: ``[n]`` integer token ids, a whole prompt or a single token.

        Returns:
            Logits ``[vocabulary]`` float32 for the token after the last one. The next call
            overwrites them.

        Raises:
            ValueError: there are more tokens than room, none at all, or one that is not in the
                vocabulary.
        """
        self._native.append(self._text, _ids(tokens), self._logits)
        return self._logits

    def step(self, tokens: Tensor) -> Tensor:
        """Run the model on a few further tokens at once, as if each was appended alone.

        Args:
            tokens: ``[n]`` integer token ids.

        Returns:
            Logits ``[n, vocabulary]`` float32 for the token after each, the same bits as from ``n``
            calls of `append`.

        Raises:
            ValueError: as for `append`.
        """
        return _step(self._native, [self._text] * len(tokens), tokens)

    def truncate(self, position: int) -> None:
        """Forget the tokens from ``position`` on."""
        self._native.truncate(self._text, position)

    def reset(self) -> None:
        """Forget all tokens seen, so that a new text can begin."""
        self.truncate(0)

    def time_stages(self, on: bool) -> None:
        """Begin to add up how long each stage of `append` takes, anew; or no longer do."""
        self._native.time_stages(on)

    def stages(self) -> dict[str, tuple[float, int]]:
        """Of each stage, in order: seconds added up, and bytes that it reads for the next token.

        Bytes are those of packed matrices in memory, and of the cache of keys and values.
        """
        return {name: (seconds, nbytes) for name, seconds, nbytes in self._native.stages()}


class Batch:
    """Several texts that one model continues together, each a `Decoder` of its own.

    Args:
        native: a ``quantine._native.Decoder``.

    Attributes:
        texts: one after another.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        self.texts = [Decoder(native, text) for text in range(native.texts)]

    def has_room(self, capacity: int, texts: int) -> bool:
        """Whether it has ``texts`` texts or more, each with room for ``capacity`` tokens."""
        return len(self.texts) >= texts and self.texts[0].capacity >= capacity

    def step(self, texts: list[int], tokens: Tensor) -> Tensor:
        """Append a token to each of some texts, with one look at the weights.

        Args:
            texts: places in `texts`.
            tokens: ``[n]`` integer token ids, one for each of these.

        Returns:
            Logits ``[n, vocabulary]`` float32 for the token after each, the same bits as if each
            text was continued alone.

        Raises:
            ValueError: as for `Decoder.append`.
        """
        return _step(self._native, texts, tokens)


def _step(native: Any, texts: list[int], tokens: Tensor) -> Tensor:
    logits = torch.empty(len(texts), native.vocabulary, dtype=torch.float32, device="cpu")
    native.step(texts, _ids(tokens), logits)
    return logits


def _ids(tokens: Tensor) -> Tensor:
    return tokens.to("cpu", torch.int64).contiguous()


@own_state()
def decoder_for(
    model: PreTrainedModel,
    capacity: int,
    *,
    arithmetic: Arithmetic | None = None,
    threads: int | None = None,
) -> Decoder:
    """Make a native decoder that computes what ``model`` computes.

    Args:
        model: a model of a type in `quantine.runtime.decoder_structures.STRUCTURES`, with float or
            packed matrices.
        capacity: largest number of tokens it will see, prompt included.
        arithmetic: arithmetic of products with packed matrices, see `quantine.kernels.matrix`;
            ``None`` takes that of the model's modules.
        threads: number of threads; ``None`` takes as many as PyTorch uses. Results do not depend on
            it.

    Raises:
        BackendUnavailable: no native decoder computes the same; the message says why.
    """
    return Decoder(_native_decoder(model, capacity, 1, arithmetic, threads))


@own_state()
def batch_for(
    model: PreTrainedModel,
    capacity: int,
    texts: int,
    *,
    arithmetic: Arithmetic | None = None,
    threads: int | None = None,
) -> Batch:
    """Make a native decoder of several texts, which share each look at the weights.

    Args:
        model, arithmetic, threads: as for `decoder_for`.
        capacity: largest number of tokens of each text, prompt included.
        texts: how many there are.

    Raises:
        BackendUnavailable: as for `decoder_for`.
    """
    return Batch(_native_decoder(model, capacity, texts, arithmetic, threads))


def _native_decoder(
    model: PreTrainedModel,
    capacity: int,
    texts: int,
    arithmetic: Arithmetic | None,
    threads: int | None,
) -> Any:
    native = backend.native()
    if native is None:
        raise BackendUnavailable("the native extension is not there, or turned off")
    arguments = arguments_for(model, native, capacity)
    threads_pool = pool() if threads is None else native.Pool(threads)
    exact = (_arithmetic(model) if arithmetic is None else arithmetic) == "exact"
    try:
        return native.Decoder(
            **arguments,
            capacity=capacity,
            texts=texts,
            exact=exact,
            integer_rows=INTEGER_ROWS,
            pool=threads_pool,
        )
    except ValueError as error:  # a shape that modules may broadcast
        raise BackendUnavailable(f"no native decoder: {error}") from error


def _arithmetic(model: PreTrainedModel) -> Arithmetic:
    found = {module.arithmetic for _, module in packed_modules(model)}
    if len(found) > 1:
        raise BackendUnavailable(
            f"no native decoder: some matrices have {' and others '.join(sorted(found))} arithmetic"
        )
    return found.pop() if found else UNSTATED


def most_likely(logits: Tensor) -> int:
    """The token id with the largest logit, the first of equals.

    Args:
        logits: ``[vocabulary]`` of a float dtype that numpy has, on the CPU.
    """
    return int(logits.numpy().argmax())  # twenty times as fast as PyTorch's
