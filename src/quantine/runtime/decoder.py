"""Decoding in C++: one native call for a prompt, and one for each further token.

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
    `quantine.runtime.model_state.ModelState`.

    Args:
        native: a ``quantine._native.Decoder``.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        self._logits = torch.empty(native.vocabulary, dtype=torch.float32, device="cpu")

    @property
    def position(self) -> int:
        """Number of tokens seen since the last `reset`."""
        return int(self._native.position)

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
        self._native.append(tokens.to("cpu", torch.int64).contiguous(), self._logits)
        return self._logits

    def reset(self) -> None:
        """Forget all tokens seen, so that a new text can begin."""
        self._native.reset()

    def time_stages(self, on: bool) -> None:
        """Begin to add up how long each stage of `append` takes, anew; or no longer do."""
        self._native.time_stages(on)

    def stages(self) -> dict[str, tuple[float, int]]:
        """Of each stage, in order: seconds added up, and bytes that it reads for the next token.

        Bytes are those of packed matrices in memory, and of the cache of keys and values.
        """
        return {name: (seconds, nbytes) for name, seconds, nbytes in self._native.stages()}


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
    native = backend.native()
    if native is None:
        raise BackendUnavailable("the native extension is not there, or turned off")
    arguments = arguments_for(model, native, capacity)
    threads_pool = pool() if threads is None else native.Pool(threads)
    exact = (_arithmetic(model) if arithmetic is None else arithmetic) == "exact"
    try:
        made = native.Decoder(
            **arguments,
            capacity=capacity,
            exact=exact,
            integer_rows=INTEGER_ROWS,
            pool=threads_pool,
        )
    except ValueError as error:  # a shape that modules may broadcast
        raise BackendUnavailable(f"no native decoder: {error}") from error
    return Decoder(made)


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
