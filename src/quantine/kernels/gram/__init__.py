"""Sums of ``x x.T`` over tokens, with ``x`` the input of a matrix: the Hessian of GPTQ.

For 16-bit inputs all of them sum exact products in float32; they differ only in how sums round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.gram import cpu, tensor_cores
from quantine.kernels.gram.reference import add_gram_reference


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``x.T @ x`` to ``total`` in place.

    The native kernel serves only bfloat16, on processors that multiply tiles of it (AMX); tensor
    cores of GPUs serve it and float16.

    Args:
        total: ``[in, in]`` float32, symmetric.
        x: ``[tokens, in]`` of any float dtype.
    """
    found = backend.of(total, x)
    if found == "native" and x.dtype == torch.bfloat16 and cpu.multiplies_tiles():
        cpu.add_gram(total, x)
    elif found == "triton" and x.dtype in tensor_cores.DTYPES:
        tensor_cores.add_gram(total, x)
    else:
        add_gram_reference(total, x)
