"""What every packed layout offers: how it stores a matrix, and what its directories need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec

if TYPE_CHECKING:
    import torch

    from quantine.formats.description import Description


class Format(Protocol):
    """A packed layout of a `QTensor`: a set of named tensors, specified in docs/format.md.

    It also says what a directory needs so that whoever reads the layout can use it.
    """

    @property
    def quant_method(self) -> str:
        """``quant_method`` in the ``config.json`` of directories that `config` describes."""
        ...

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of every tensor the layout may have."""
        ...

    def required(self, spec: QuantSpec, out_features: int, in_features: int) -> tuple[str, ...]:
        """Names of the tensors that every matrix of ``spec`` and of this shape has."""
        ...

    @property
    def writable(self) -> bool:
        """Whether plans may ask for it; a layout that is not is only read."""
        ...

    @property
    def exclusive(self) -> bool:
        """Whether all quantized layers of a directory must have it.

        Such directories are read by other programs, which know nothing else.
        """
        ...

    @property
    def linears_only(self) -> bool:
        """Whether it holds only Linear layers inside of decoder blocks."""
        ...

    @property
    def holds_bias(self) -> bool:
        """Whether its readers add the bias of a layer."""
        ...

    @property
    def holds_statistics_as_codes(self) -> bool:
        """Whether scales and zero points may be codes of second grids."""
        ...

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Dtype of every float tensor beside packed ones; ``None`` where they keep their own."""
        ...

    def config(self, described: Description) -> dict[str, Any]:
        """Fields of ``config.json``, ``quantization_config`` among them, that its readers need."""
        ...

    def supports(self, spec: QuantSpec, outliers: bool) -> bool:
        """Whether the layout can hold what ``spec`` asks for, and ``outliers`` if there are."""
        ...

    def refusal(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape cannot be held, and the remedy; ``None`` if it can."""
        ...

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """The tensors of the layout; raises `FormatError` for what it cannot hold.

        Nothing is dropped; a layout that rounds says so, and `unpack` gives what it really holds.
        """
        ...

    def unpack(
        self,
        tensors: dict[str, Tensor],
        spec: QuantSpec,
        in_features: int,
        rows: Tensor | None = None,
    ) -> QTensor:
        """What `pack` stored, bit for bit, for all rows or those of the int64 indices ``rows``.

        Raises `FormatError` for tensors that do not fit ``spec``.
        """
        ...

    def check(
        self, tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> None:
        """Refuse tensors that hold no matrix of ``spec`` and this shape, whatever their codes are.

        Everything is checked that `unpack` and kernels compute places from, and that scales, zero
        points and outliers are values that `pack` writes. Codes are not decoded: any are valid.
        Raises `FormatError`, which names the tensor.
        """
        ...

    def nbytes(
        self,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        stores_order: bool,
        outlier_share: float = 0.0,
    ) -> int:
        """Bytes of the packed tensors: exact without outliers, else an estimate."""
        ...
