"""Where tests of programs for GPUs run: on a GPU, or on the CPU by Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from typing import Any, Final

from torch import Tensor

DEVICE: Final = "cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu"
EXAMPLES: Final = 60 if DEVICE == "cpu" else 12
"""Random examples of a test in which each is another program: a GPU has to compile them."""


def moved(value: Any, device: str = DEVICE) -> Any:
    """``value`` with all tensors in it, and in the dataclasses in it, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    parts = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
    return type(value)(**parts)
