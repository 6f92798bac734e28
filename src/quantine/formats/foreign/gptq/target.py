"""GPTQ checkpoints: what they hold, and writing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from quantine.core.activation_spec import ActivationSpec
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.families import family_of
from quantine.formats.directory import write_json
from quantine.formats.foreign.checkpoint import ScaleDtype, write_files, write_weights
from quantine.formats.foreign.gptq.layout import BITS, pack_matrix
from quantine.formats.foreign.gptq.settings import settings_of
from quantine.formats.foreign.plain import plain, plain_refusal
from quantine.formats.foreign.target import WEIGHTS_ONLY, Exportable, Matrix


class GPTQDirectory:
    """2, 3, 4 or 8 bits along inputs; orders of columns become ``g_idx``; the table is float."""

    decodes: ClassVar[bool] = False
    needs_quantized: ClassVar[bool] = True
    float_dtype: ClassVar[None] = None

    def model_refusal(self, config: Any) -> str | None:
        """None: any architecture has a place for it."""
        return None

    def activations_refusal(self, activations: ActivationSpec) -> str | None:
        """Any: there is no place for how they are rounded."""
        return WEIGHTS_ONLY

    def refusal(self, matrix: Matrix) -> str | None:
        """See `quantine.formats.foreign.target.Target.refusal`."""
        if matrix.role == "embedding":
            return "GPTQ files hold no quantized token table"
        reason = plain_refusal(matrix)
        if reason is None and matrix.spec.bits not in BITS:
            return f"GPTQ files hold 2, 3, 4 and 8 bits, not {matrix.spec.bits}"
        return reason

    def nearest(self, matrix: Matrix) -> QuantSpec | None:
        """The next width that there is, in groups of 32 where these divide the inputs."""
        if matrix.role == "embedding":
            return None
        bits = next(bits for bits in BITS if bits >= matrix.spec.bits)
        return QuantSpec(bits, 32 if matrix.in_features % 32 == 0 else -1, matrix.spec.sym)

    def write(self, source: Exportable, out: Path) -> list[str]:
        """See `quantine.formats.foreign.target.Target.write`; version 1 where no zero is 0."""
        specs, ordered, version = _survey(source)
        dtype = ScaleDtype.of(source)

        def pack(name: str, qtensor: QTensor) -> dict[str, Tensor]:
            matrix = plain(name, qtensor)
            dtype.see(matrix.scale)
            return pack_matrix(matrix, version, ordered)

        write_weights(source, out, pack)
        family = family_of(source.config)
        inside = f"{family.blocks}."
        floats = [name for name in source.matrices if name not in specs]
        beside = dict.fromkeys([*source.kept_linears, *floats])
        kept = [name for name in beside if name.startswith(inside)]
        settings = settings_of(specs, ordered, version, kept, family.head)
        write_files(source, out, {"dtype": dtype.name, "quantization_config": settings})
        write_json(out / "quantize_config.json", settings)
        return dtype.notes("float16")


def _survey(source: Exportable) -> tuple[dict[str, QuantSpec], bool, int]:
    """Grids of the quantized layers, whether one needs ``g_idx``, and the version that all fit."""
    specs: dict[str, QuantSpec] = {}
    ordered, version = False, 1
    for name in source.matrices:
        found = source.read(name)
        if isinstance(found, Tensor):
            continue
        matrix = plain(name, found)
        rows = matrix.scale.shape[1] == 1
        size = -1 if rows else matrix.group_size
        specs[name] = QuantSpec(matrix.bits, size, found.grid.zero_point is None)
        ordered |= matrix.group_of is not None
        if bool((matrix.zero == 0).any()):
            version = 2
    return specs, ordered, version
