"""A module that holds a packed matrix, as files have it and as kernels read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantine.core.ambient import without_autocast
from quantine.core.arithmetic import UNSTATED, Arithmetic
from quantine.core.fixed_dtypes import FixedDtypes
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats import format_named
from quantine.kernels import backend
from quantine.kernels.matrix import packed_matrix, product
from quantine.runtime.device_map import is_loaded_per_call
from quantine.runtime.recorded import is_compiled, listed, multiply_packed
from quantine.runtime.snapshot import Snapshot

COMPUTED: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Dtypes of activations that kernels accept."""


class Packed(FixedDtypes):
    """A packed matrix ``[out, in]``, its tensors kept as buffers of the module.

    The buffers keep their dtypes when a model is cast. Where a GPU's programs read a matrix of
    their own, the buffers are on the CPU (mapped from the files, if they were), and only that
    matrix takes the GPU's memory.

    Args:
        format_name: name of the packed layout, in `quantine.formats.FORMATS`.
        spec: bits and groups of the matrix.
        out_features, in_features: shape of the matrix.
        tensors: the layout's packed tensors by name, or tensors of their shapes on the meta device.

    Attributes:
        arithmetic: arithmetic of products, see `quantine.kernels.matrix`; may be changed at any
            time.
    """

    leaves_gpus: bool = True
    """Whether buffers go to the CPU where a GPU's programs read a matrix of their own."""

    def __init__(
        self,
        format_name: str,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        tensors: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.format_name = format_name
        self.spec = spec
        self.out_features = out_features
        self.in_features = in_features
        self.arithmetic: Arithmetic = UNSTATED
        self.tensor_names = self.fixed_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._made_from: Snapshot | None = None
        self._made_for: torch.device | None = None
        self._matrix: Any = None
        self._number = listed(self)

    def packed_tensors(self) -> dict[str, Tensor]:
        """The packed tensors by their name in the layout."""
        return {name: self.get_buffer(name) for name in self.tensor_names}

    def check(self, name: str) -> None:
        """Refuse packed tensors, as they were read from files, that hold no matrix of this shape.

        Args:
            name: full name of this module, for errors.

        Raises:
            FormatError: names the tensor, see `quantine.formats.format.Format.check`.
        """
        shape = (self.out_features, self.in_features)
        try:
            format_named(self.format_name).check(self.packed_tensors(), self.spec, *shape)
        except FormatError as error:
            raise FormatError(f"{name} is damaged: {error}") from error

    def qtensor(self, device: torch.device | None = None) -> QTensor:
        """The matrix unpacked on ``device``; ``None`` is where the packed tensors are."""
        return self._unpacked(self._packed_on(device))

    def dequantize(self, device: torch.device | None = None) -> Tensor:
        """The matrix decoded to float32, ``[out, in]``, columns in the model's order of inputs.

        Args:
            device: as for `qtensor`.
        """
        return self.qtensor(device).dequantize()

    def matrix(self, device: torch.device | None = None) -> Any:
        """The matrix as kernels of ``device`` read it, or ``None``.

        See `quantine.kernels.matrix.packed_matrix`. It is made at first use, and again when a
        packed tensor is replaced or written to, or for another device. A GPU's makes the packed
        tensors go to the CPU.

        Args:
            device: ``None`` is that of the matrix made last, or where the packed tensors are.
        """
        place = device or self._made_for or next(iter(self.packed_tensors().values())).device
        fresh = self._made_from is not None and self._made_from.holds(
            self.packed_tensors().values()
        )
        if not fresh or place != self._made_for:
            self._matrix = None  # frees its memory
            packed = self._packed_on(place)
            self._matrix = packed_matrix(self._unpacked(packed))
            self._made_for = place
            if backend.of(*packed.values()) == "triton":
                self._leave_to_programs(packed, place, self._matrix is not None)
            self._made_from = Snapshot(self.packed_tensors().values())
        return self._matrix

    def share(self, matrix: Any) -> None:
        """Let kernels read ``matrix`` from now on, a copy of what `matrix` returned last."""
        self._matrix = matrix

    def product(self, x: Tensor) -> Tensor:
        """``x @ W.T``, with ``W`` the packed matrix.

        Few rows are multiplied straight with the codes, with weights decoded in registers and sums
        in float32. More are multiplied by PyTorch, with weights decoded before, see
        `quantine.kernels.matrix.product`. The whole matrix is decoded by PyTorch where no kernel
        reads it, where gradients are needed or the computation is traced or exported, and for
        float64. A compiled graph holds one operator, see `quantine.runtime.recorded`.

        Autocast changes nothing: like a function that it does not list, this computes in the dtype
        of its input.

        Args:
            x: ``[..., in]`` of any float dtype.

        Returns:
            ``[..., out]`` in the dtype of ``x``.
        """
        if is_compiled(x):
            return self._operated(x, rounds=False)
        with without_autocast(x.device):
            return self._product(x)

    def rounded_product(self, x: Tensor) -> Tensor:
        """`product`, after the inputs are rounded if they are; shapes are those of it."""
        return self.product(x)

    def _operated(self, x: Tensor, rounds: bool) -> Tensor:
        """A product as one operator, see `quantine.runtime.recorded`."""
        rows = x.reshape(-1, self.in_features)
        result: Tensor = multiply_packed(rows, self._number, self.out_features, rounds)
        return result.view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 and "exponent" in self.tensor_names:
            return self._product(x.float()).to(x.dtype)  # float16 would not hold the weights
        matrix = self.matrix(x.device) if takes_kernels(x) else None
        if matrix is None:
            return linear(x, self.dequantize(x.device).to(x.dtype))
        rows = product(matrix, x.reshape(-1, self.in_features), self.arithmetic)
        if is_loaded_per_call(self):
            self._forget()
        return rows.view(*x.shape[:-1], self.out_features)

    def _leave_to_programs(
        self, packed: dict[str, Tensor], place: torch.device, made: bool = True
    ) -> None:
        """Let only what a GPU's programs read take its memory, if it was ``made`` of ``packed``."""
        leaves = self.leaves_gpus and made
        self._buffers.update(self._packed_on(torch.device("cpu")) if leaves else packed)
        self._made_for = place

    def _forget(self) -> None:
        """Free the memory of the matrix of kernels."""
        self._matrix = self._made_from = self._made_for = None

    def _packed_on(self, device: torch.device | None) -> dict[str, Tensor]:
        packed = self.packed_tensors()
        return packed if device is None else {name: t.to(device) for name, t in packed.items()}

    def _unpacked(self, packed: dict[str, Tensor]) -> QTensor:
        return format_named(self.format_name).unpack(packed, self.spec, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before, place = self.packed_tensors(), self._made_for
        super()._apply(fn, recurse)
        if place is not None:
            like_matrix = torch.empty(0, dtype=torch.uint8, device=place)
            if fn(like_matrix).device != place:  # a move, and no cast
                self._forget()
        after = self.packed_tensors()
        for name, tensor in before.items():
            # The GPU's matrix is made of what is on the CPU: see `matrix`.
            if self.leaves_gpus and tensor.device.type == "cpu" and _has_programs(after[name]):
                self._buffers[name] = tensor
        return self

    def extra_repr(self) -> str:
        """One line for ``print(model)``: shape, layout and spec."""
        return f"{self.in_features} -> {self.out_features}, {self.format_name}, {self.spec}"

    def __getstate__(self) -> dict[str, Any]:
        """The state without the matrix of kernels: copies make one of their own."""
        return {**self.__dict__, "_matrix": None, "_made_from": None, "_made_for": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a number of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = listed(self)


def takes_kernels(x: Tensor) -> bool:
    """Whether kernels can multiply ``x``.

    There must be some for its device, it must be of a dtype in `COMPUTED`, and PyTorch must neither
    need its gradient nor record the computation.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad
    if wanted or x.dtype not in COMPUTED or backend.is_recorded():
        return False
    return backend.of(x) != "reference"


def packed_modules(model: nn.Module) -> Iterable[tuple[str, Packed]]:
    """Every packed module of ``model``, as pairs of its full name and the module."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Packed))


def _has_programs(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a GPU whose programs multiply."""
    return backend.of(tensor) == "triton"
