"""`quantine.kernels.gram` on NVIDIA's GPUs: products of 16-bit floats, summed in float32."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import Tensor

from quantine.kernels.gram.reference import add_by_panels

DTYPES: Final = (torch.bfloat16, torch.float16)
"""Dtypes whose products are exact in float32."""


def add_gram(total: Tensor, x: Tensor) -> None:
    """See `quantine.kernels.gram.add_gram`; ``x`` is of one of `DTYPES`.

    cuBLAS takes tensor cores for it: the products are those of the reference, at ten times its
    speed, as nothing has to be turned into float32.
    """
    add_by_panels(total, x, partial(torch.mm, out_dtype=torch.float32))
