"""The directory that the kernels of SpQR's authors read, as a target of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantine.core.activation_spec import ActivationSpec
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.formats.description import Description
from quantine.formats.foreign.checkpoint import write_files, write_weights
from quantine.formats.foreign.spqr.layout import SPEC, Spqr
from quantine.formats.foreign.target import WEIGHTS_ONLY, Exportable, Matrix


class SpqrDirectory:
    """Layout ``spqr``: 3 bits in groups of 16 with second grids and outliers, Linears in blocks.

    Outliers are stored as float16 differences from their codes, see `Spqr`.
    """

    decodes: ClassVar[bool] = False
    needs_quantized: ClassVar[bool] = True
    float_dtype: ClassVar[torch.dtype] = torch.float16

    def model_refusal(self, config: Any) -> str | None:
        """GPT-2: its matrices are no Linear layers."""
        if config.model_type == "gpt2":
            return "layout spqr holds Linear layers only, and GPT-2 has Conv1D"
        return None

    def activations_refusal(self, activations: ActivationSpec) -> str | None:
        """Any: there is no place for how they are rounded."""
        return WEIGHTS_ONLY

    def refusal(self, matrix: Matrix) -> str | None:
        """See `quantine.formats.foreign.target.Target.refusal`."""
        if matrix.role != "block":
            return "layout spqr holds only Linear layers inside of decoder blocks"
        if matrix.biased:
            return "it has a bias, which the other readers of layout spqr drop"
        if not Spqr().supports(matrix.spec, matrix.outliers):
            return "layout spqr holds 3 bits in groups of 16 with statistics of 3 bits only"
        return Spqr().refusal(matrix.spec, matrix.out_features, matrix.in_features)

    def nearest(self, matrix: Matrix) -> QuantSpec | None:
        """Its one spec where it is for such a layer and shape; else floats."""
        fits = matrix.role == "block" and not matrix.biased
        shaped = Spqr().refusal(SPEC, matrix.out_features, matrix.in_features) is None
        return SPEC if fits and shaped else None

    def write(self, source: Exportable, out: Path) -> list[str]:
        """See `quantine.formats.foreign.target.Target.write`."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}

        def pack(name: str, qtensor: QTensor) -> dict[str, Tensor]:
            tensors = Spqr().pack(qtensor)
            shapes[name] = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            return tensors

        write_weights(source, out, pack)
        floats = [name for name in source.matrices if name not in shapes]
        described = Description(
            [], {}, "exact", None, shapes, list(dict.fromkeys([*source.kept_linears, *floats]))
        )
        write_files(source, out, {"dtype": "float16", **Spqr().config(described)})
        return []
