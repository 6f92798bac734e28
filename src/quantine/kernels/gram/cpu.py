"""`quantine.kernels.gram` by the native extension: tensors are on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.threads import pool


def multiplies_tiles() -> bool:
    """Whether this processor has instructions that multiply tiles of bfloat16 (AMX)."""
    return bool(backend.extension().multiplies_tiles())


def add_gram(total: Tensor, x: Tensor) -> None:
    """See `quantine.kernels.gram.add_gram`; ``x`` is bfloat16."""
    backend.extension().add_gram(x.contiguous().view(torch.int16), total, pool())
