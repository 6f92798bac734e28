"""Products with packed matrices.

What multiplies fast reads codes in an order of its own, which is made once, when a matrix is
loaded: a native `Matrix` holds the tensors of a `QTensor` in that order; see docs/kernels.md.

There are two kinds of arithmetic. ``exact``: weights are decoded in registers, and products are
summed in float32. ``fast``: activations are rounded to 16 bits first, one scale for each block of
at most `quantine.kernels.matrix.reference.BLOCK` inputs, which never crosses a group of weights.
Where groups run along outputs, what is rounded is each activation times the scale of its input,
once for each group. `multiply_reference` is the meaning of both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantine.core.arithmetic import Arithmetic
from quantine.core.qtensor import QTensor
from quantine.kernels import backend
from quantine.kernels.matrix import cpu
from quantine.kernels.matrix.cpu import Matrix


def packed_matrix(qtensor: QTensor) -> Matrix | None:
    """The native matrix of ``qtensor``; ``None`` without the extension, or off the CPU.

    ``None`` also where groups run along outputs and are neither multiples of
    `quantine.kernels.matrix.cpu.TILE` rows nor all rows: tiles would cross them.
    """
    native = backend.of(qtensor.codes) == "native" and cpu.tiles_fit(qtensor)
    return cpu.packed_matrix(qtensor) if native else None


def float_matrix(weight: Tensor) -> Matrix | None:
    """The native matrix of a float ``weight`` ``[out, in]``, in 16 bit if that loses nothing.

    ``None`` without the extension, or off the CPU.
    """
    return cpu.float_matrix(weight) if backend.of(weight) == "native" else None


def multiply(matrices: Sequence[Matrix], x: Tensor, arithmetic: Arithmetic) -> list[Tensor]:
    """``x @ W.T`` for each of ``matrices``, whose inputs are the same; one parallel step.

    Args:
        matrices: native ones, ``[out, in]``.
        x: ``[batch, in]`` float32, contiguous.
        arithmetic: see the module.

    Returns:
        ``[batch, out]`` float32 each.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.multiply(matrices, x, arithmetic)


def multiply_panels(matrix: Matrix, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """``x @ W.T`` by PyTorch, weights decoded part by part: for many rows of ``x``.

    ``fast`` rounds float32 to bfloat16 where the processor multiplies that; docs/kernels.md says
    what it costs.

    Args:
        matrix: native.
        x: ``[batch, in]`` float32, bfloat16 or float16; the weights are rounded to its dtype.
        arithmetic: see the module.

    Returns:
        ``[batch, out]`` in the dtype of ``x``.

    Raises:
        BackendUnavailable: ``x`` is not on the CPU.
    """
    backend.check_native(x)
    return cpu.multiply_panels(matrix, x, arithmetic)


def read_words(words: Tensor) -> int:
    """The sum of ``words`` ``[n]`` int64 modulo 2**64: reads memory as fast as it comes.

    Raises:
        BackendUnavailable: ``words`` are not on the CPU.
    """
    backend.check_native(words)
    return cpu.read_words(words)
