"""Models that decode natively: one call for a prompt, and one for each token.

What the modules of transformers compute stays the meaning. A model that the native decoder would
compute otherwise is refused, with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantine.core.arithmetic import UNSTATED, Arithmetic
from quantine.errors import BackendUnavailable
from quantine.kernels import backend
from quantine.kernels.threads import pool
from quantine.runtime.decoder_model import arguments_for
from quantine.runtime.modules import packed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder:
    """A model and the tokens it has seen; float32 throughout.

    It shares packed weights with the model it was made from, and copies float ones and settings:
    make another after changing any. ``model.generate`` does, when parameters or ``model.config``
    change; what modules keep to themselves, such as the ``eps`` of a norm, it does not notice.

    Args:
        native: a ``quantine._native.Decoder``.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        self._logits = torch.empty(native.vocabulary, dtype=torch.float32, device="cpu")

    @property
    def position(self) -> int:
        """Number of tokens seen."""
        return int(self._native.position)

    @property
    def capacity(self) -> int:
        """Number of tokens there is room for."""
        return int(self._native.capacity)

    def append(self, tokens: Tensor) -> Tensor:
        """Append ``tokens`` ``[n]`` integers, a whole prompt or a single one.

        Returns:
            Logits ``[vocabulary]`` float32 after the last of them, good until the next call.

        Raises:
            ValueError: there is no room, no token, or one that is not in the vocabulary.
        """
        self._native.append(tokens.to("cpu", torch.int64).contiguous(), self._logits)
        return self._logits

    def reset(self) -> None:
        """Forget all tokens."""
        self._native.reset()


def decoder_for(
    model: PreTrainedModel,
    capacity: int,
    *,
    arithmetic: Arithmetic | None = None,
    threads: int | None = None,
) -> Decoder:
    """A native decoder that computes what ``model`` does.

    Args:
        model: of the llama or opt family, with float or packed matrices.
        capacity: number of tokens there will be room for, prompt included.
        arithmetic: of products with packed matrices; that of the model's modules if ``None``.
        threads: as many as PyTorch uses if ``None``; results do not depend on it.

    Raises:
        BackendUnavailable: no native decoder computes the same; the message says why.
    """
    native = backend.native()
    if native is None:
        raise BackendUnavailable("the native extension is not there, or turned off")
    arguments = arguments_for(model, native, capacity)
    threads_pool = pool() if threads is None else native.Pool(threads)
    if arithmetic is None:
        arithmetic = next((module.arithmetic for _, module in packed_modules(model)), UNSTATED)
    exact = arithmetic == "exact"
    return Decoder(native.Decoder(**arguments, capacity=capacity, exact=exact, pool=threads_pool))


def most_likely(logits: Tensor) -> int:
    """The first token with the largest of ``logits`` ``[vocabulary]``, on the CPU."""
    return int(logits.numpy().argmax())  # twenty times as fast as PyTorch's
