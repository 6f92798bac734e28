"""Decoded weights as plain floats: any plan fits, and nothing is small any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantine.core.activation_spec import ActivationSpec
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.formats.foreign.checkpoint import write_files, write_weights
from quantine.formats.foreign.target import WEIGHTS_ONLY, Exportable, Matrix


class FloatDirectory:
    """A directory that ``from_pretrained`` loads without quantine; float32 has every weight."""

    decodes: ClassVar[bool] = True
    needs_quantized: ClassVar[bool] = False
    float_dtype: ClassVar[None] = None

    def model_refusal(self, config: Any) -> str | None:
        """None: any architecture has a place for it."""
        return None

    def activations_refusal(self, activations: ActivationSpec) -> str | None:
        """Any: there is no place for how they are rounded."""
        return WEIGHTS_ONLY

    def refusal(self, matrix: Matrix) -> str | None:
        """None: float32 holds every weight."""
        return None

    def nearest(self, matrix: Matrix) -> QuantSpec | None:
        """None: nothing is rounded."""
        return None

    def write(self, source: Exportable, out: Path) -> list[str]:
        """See `quantine.formats.foreign.target.Target.write`."""

        def pack(name: str, qtensor: QTensor) -> dict[str, Tensor]:
            return {"weight": qtensor.dequantize()}

        write_weights(source, out, pack)
        dtype = str(source.dtype or torch.float32).removeprefix("torch.")
        write_files(source, out, {"dtype": dtype})
        return []
