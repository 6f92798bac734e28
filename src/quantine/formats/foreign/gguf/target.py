"""GGUF files: what they hold without loss, and writing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from quantine.core.activation_spec import ActivationSpec
from quantine.core.qtensor import QTensor
from quantine.core.spec import WHOLE_ROW, QuantSpec
from quantine.errors import FormatError
from quantine.formats.foreign.gguf.arrange import arranged, row_order
from quantine.formats.foreign.gguf.blocks import LEAST, TYPES, fitting
from quantine.formats.foreign.gguf.file import GGUFWriter
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, type_of
from quantine.formats.foreign.gguf.metadata import ALIKE, architecture_of, metadata_of
from quantine.formats.foreign.gguf.same_model import as_read
from quantine.formats.foreign.gguf.tokenizer import tokenizer_of
from quantine.formats.foreign.plain import Plain, plain, plain_refusal
from quantine.formats.foreign.target import WEIGHTS_ONLY, Exportable, Matrix
from quantine.source.gguf.config import ARCHITECTURES
from quantine.source.gguf.parts import read_parts
from quantine.source.gguf.rope import FREQUENCIES, llama3_factors
from quantine.source.gguf.weights import check_gguf_weights, model_names
from quantine.source.model_source import ModelSource

FILE: Final = "model.gguf"
"""Name of the file in the directory that is written."""
FLOATS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""Codes of ggml's types of floats."""
FILE_TYPES: Final = {
    0: 0,
    1: 1,
    30: 32,
    **{kind.code: kind.file_type for kind in TYPES},
    **{kind.code: kind.file_type for kind in GRID_TYPES.values()},
}
"""What ``general.file_type`` calls a file, by the type that most of its matrices have."""
IN_FLOAT32: Final = ("position_embd.weight", "token_types.weight")
"""Matrices that llama.cpp adds to others, and so wants in float32."""


class GGUFFileTarget:
    """Blocks of one scale: 3 bits in Q4_0, 4 in Q5_0, more in Q8_0, or smaller where that fits.

    Matrices on the grid of one of ggml's types are written in that.
    """

    decodes: ClassVar[bool] = False
    needs_quantized: ClassVar[bool] = False
    float_dtype: ClassVar[None] = None

    def model_refusal(self, config: Any) -> str | None:
        """Architectures whose GGUF files quantine does not read."""
        if architecture_of(config) is None:
            known = [*(one.model_type for one in ARCHITECTURES.values()), *ALIKE]
            return (
                f"GGUF files of model type {config.model_type} are not written, only those of "
                f"{', '.join(known)}"
            )
        try:
            as_read(config)
        except FormatError as error:
            return str(error)
        return None

    def activations_refusal(self, activations: ActivationSpec) -> str | None:
        """Any: there is no place for how they are rounded."""
        return WEIGHTS_ONLY

    def refusal(self, matrix: Matrix) -> str | None:
        """See `quantine.formats.foreign.target.Target.refusal`."""
        spec, kind = matrix.spec, type_of(matrix.spec)
        if kind is not None:
            width = matrix.in_features
            fits = width % kind.weights == 0
            return None if fits else f"{kind.name} needs multiples of {kind.weights}, not {width}"
        reason = plain_refusal(matrix)
        if reason is not None:
            return reason
        if matrix.ordered and spec.group_size != WHOLE_ROW:
            return "GGUF takes no order of columns: solve with groups: static"
        size = spec.group_length(matrix.in_features)
        if size % LEAST:
            return f"GGUF needs groups and rows of a multiple of {LEAST} inputs, not {size}"
        if spec.bits == 8 and not spec.sym:
            return "8 bits with zero points may not fit into Q8_0: use sym: true, or 7 bits"
        return None

    def nearest(self, matrix: Matrix) -> QuantSpec | None:
        """Symmetric groups of 32: the smallest type that has at least as many bits."""
        if matrix.in_features % LEAST:
            return None
        bits = matrix.spec.bits
        return QuantSpec(4 if bits <= 3 else 5 if bits == 4 else 8, LEAST, True)

    def write(self, source: Exportable, out: Path) -> list[str]:
        """See `quantine.formats.foreign.target.Target.write`."""
        architecture = architecture_of(source.config)
        assert architecture is not None
        model = ModelSource("", source.directory).bare_model(as_read(source.config))
        names = {name: stored for stored, name in model_names(architecture, model).items()}
        rope = source.config.rope_parameters if ARCHITECTURES[architecture].rotary else None
        with GGUFWriter(out / f"{FILE}.tensors") as writer:
            for name in [*source.floats, *source.matrices]:
                self._add(writer, source, name, names)
            if rope and rope.get("rope_type") == "llama3":
                self._add_frequencies(writer, source.config, rope)
            kinds = Counter(tensor.kind for tensor in writer.tensors if len(tensor.shape) > 1)
            file_type = FILE_TYPES[kinds.most_common(1)[0][0]]
            words, notes = tokenizer_of(source.directory, source.config.vocab_size, source.settings)
            writer.finish(out / FILE, {**metadata_of(source.config, file_type), **words})
        check_gguf_weights(read_parts(out / FILE), model)
        if TYPES[0].code in kinds:
            notes.append(
                f"{TYPES[0].name} is read by llama.cpp since 2026, and by no other reader yet"
            )
        return notes

    def _add(
        self, writer: GGUFWriter, source: Exportable, name: str, names: Mapping[str, str]
    ) -> None:
        """Write one tensor, or matrix."""
        full = f"{name}.weight" if name in source.matrices else name
        if full not in names:
            raise FormatError(f"{full} has no name in GGUF files: export --to float")
        stored = names[full]
        found = source.read(name) if name in source.matrices else source.read_float(name)
        if isinstance(found, QTensor):
            kind = type_of(source.matrices[name].spec)
            if kind is None:
                self._add_fitting(writer, source.config, stored, name, plain(name, found))
            else:
                rows, shape = kind.encode(found), found.codes.shape
                self._add_rows(writer, source.config, stored, shape, kind.code, rows)
            return
        owner = source.model.get_submodule(full.rpartition(".")[0])
        if name not in source.matrices and type(owner).__name__ == "Conv1D" and found.ndim == 2:
            found = found.T
        tensor = arranged(stored, found, source.config).contiguous()
        if tensor.ndim < 2 or stored in IN_FLOAT32 or tensor.dtype not in FLOATS:
            tensor = tensor.float()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        writer.add(stored, tensor.shape, FLOATS[tensor.dtype], data)

    def _add_fitting(
        self, writer: GGUFWriter, config: Any, stored: str, name: str, matrix: Plain
    ) -> None:
        """Write a matrix in the smallest type that holds it."""
        fits = fitting(matrix)
        if fits is None:
            raise FormatError(f"{name} does not fit into any type of GGUF: use --nearest")
        kind, values, scale = fits
        self._add_rows(writer, config, stored, values.shape, kind.code, kind.encode(values, scale))

    def _add_rows(
        self,
        writer: GGUFWriter,
        config: Any,
        stored: str,
        shape: torch.Size,
        code: int,
        rows: Tensor,
    ) -> None:
        """Write rows of bytes ``[out, bytes]`` in the order in which llama.cpp wants them."""
        order = row_order(stored, len(rows), config)
        rows = rows if order is None else rows[order]
        writer.add(stored, shape, code, rows.contiguous().numpy().tobytes())

    def _add_frequencies(self, writer: GGUFWriter, config: Any, rope: Mapping[str, float]) -> None:
        """The factors of rotary embeddings of Llama 3.1 and later, which no metadata say."""
        factors = llama3_factors(rope["factor"], config.head_dim // 2, rope["rope_theta"])
        data: Tensor = torch.tensor(factors, dtype=torch.float32, device="cpu")
        writer.add(FREQUENCIES, data.shape, 0, data.numpy().tobytes())
