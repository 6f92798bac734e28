"""Sums of ``x x.T`` over tokens, with ``x`` the input of a matrix: the Hessian of GPTQ.

For bfloat16 inputs, native and reference sum exact products in float32 and differ only in how
those sums round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.gram import cpu
from quantine.kernels.gram.reference import add_gram_reference


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``x.T @ x`` to ``total`` in place.

    The native kernel serves only bfloat16, on processors that multiply tiles of it (AMX).

    Args:
        total: ``[in, in]`` float32, symmetric.
        x: ``[tokens, in]`` of any float dtype.
    """
    if backend.of(total, x) == "native" and x.dtype == torch.bfloat16 and cpu.multiplies_tiles():
        cpu.add_gram(total, x)
    else:
        add_gram_reference(total, x)
