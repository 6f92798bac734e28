"""Checkpoints of compressed-tensors: what they hold, and writing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from quantine.core.activation_spec import ActivationSpec
from quantine.core.qtensor import QTensor
from quantine.core.spec import WHOLE_ROW, QuantSpec
from quantine.families import family_of
from quantine.formats.foreign.checkpoint import ScaleDtype, write_files, write_weights
from quantine.formats.foreign.compressed_tensors import int8
from quantine.formats.foreign.compressed_tensors.layout import pack_matrix
from quantine.formats.foreign.compressed_tensors.settings import settings_of
from quantine.formats.foreign.plain import plain, plain_refusal
from quantine.formats.foreign.target import Exportable, Matrix


class CompressedTensorsDirectory:
    """2 to 8 bits along inputs in input order; the table is float.

    The format is ``pack-quantized``, or ``int-quantized`` where activations are rounded to 8 bits.
    """

    decodes: ClassVar[bool] = False
    needs_quantized: ClassVar[bool] = True
    float_dtype: ClassVar[None] = None

    def model_refusal(self, config: Any) -> str | None:
        """GPT-2: its matrices are no Linear layers."""
        if config.model_type == "gpt2":
            return "compressed-tensors holds Linear layers only, and GPT-2 has Conv1D"
        return None

    def activations_refusal(self, activations: ActivationSpec) -> str | None:
        """See `quantine.formats.foreign.target.Target.activations_refusal`."""
        return int8.activations_refusal(activations)

    def refusal(self, matrix: Matrix) -> str | None:
        """See `quantine.formats.foreign.target.Target.refusal`."""
        if matrix.role == "embedding":
            return "compressed-tensors files hold no quantized token table"
        reason = plain_refusal(matrix)
        if reason is None and matrix.rounded:
            reason = int8.matrix_refusal(matrix)
        if reason is None and matrix.ordered and matrix.spec.group_size != WHOLE_ROW:
            return "compressed-tensors takes no order of columns: solve with groups: static"
        return reason

    def nearest(self, matrix: Matrix) -> QuantSpec | None:
        """The same width and, where they divide rows, groups; along inputs, without outliers."""
        if matrix.role == "embedding" or (matrix.role == "head" and matrix.rounded):
            return None
        if matrix.rounded:
            return int8.SPEC
        spec = matrix.spec
        size = spec.group_size if spec.group_axis == "in" and spec.group_size else 32
        size = size if size == WHOLE_ROW or matrix.in_features % size == 0 else WHOLE_ROW
        return QuantSpec(spec.bits, size, spec.sym)

    def write(self, source: Exportable, out: Path) -> list[str]:
        """See `quantine.formats.foreign.target.Target.write`."""
        specs: dict[str, QuantSpec] = {}
        dtype = ScaleDtype.of(source)

        def pack(name: str, qtensor: QTensor) -> dict[str, Tensor]:
            matrix, sym = plain(name, qtensor), qtensor.grid.zero_point is None
            rows = matrix.scale.shape[1] == 1
            specs[name] = QuantSpec(matrix.bits, WHOLE_ROW if rows else matrix.group_size, sym)
            dtype.see(matrix.scale)
            if source.activations is None:
                return pack_matrix(matrix, sym)
            return int8.pack_int8(matrix) | int8.pack_inputs(name, source.read_grid(name))

        write_weights(source, out, pack)
        head = family_of(source.config).head
        floats = [name for name in source.matrices if name not in specs]
        kept = list(dict.fromkeys([*source.kept_linears, *floats]))
        rounded = source.activations
        inputs = None if rounded is None else int8.input_settings(rounded)
        settings = settings_of(specs, kept, head not in specs, inputs)
        write_files(source, out, {"dtype": dtype.name, "quantization_config": settings})
        warnings = [] if rounded is None else [int8.OVERFLOW]
        return [*dtype.notes("float16 or float32"), *warnings]
