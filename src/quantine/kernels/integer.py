"""Products in integers of packed weights with rounded activations (RPTQ, arXiv 2304.01089).

A weight is ``s_w * (c_w - z_w)``, with a scale and a zero point for each output and group of
inputs. A rounded activation is ``s_x * (c_x - z_x)``, with a scale and a zero point for each
cluster of inputs or for each token. Where every group of weights lies within one cluster, a group
adds

    s_w * s_x * (sum(c_w * c_x) - z_w * sum(c_x) - z_x * sum(c_w) + n * z_w * z_x)

to an output, with whole sums over its ``n`` inputs. Where tokens have factors
(`quantine.core.factors`), that is of an activation divided by its token's, and the output is
multiplied by it. `multiply_reference` is that formula. The native kernels sum
``(c_w - o_w) * c_x``, where ``o_w`` is the whole number next to ``z_w`` that leaves a byte with a
sign; the sums are as exact, and what floats then round differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from quantine.core.factors import factors, steepness
from quantine.core.grid import encode
from quantine.core.qtensor import QTensor
from quantine.core.ranges import covering
from quantine.kernels import backend
from quantine.kernels.matrix import Matrix, has_exact_zero
from quantine.kernels.threads import pool

SCALAR: Final = "scalar"
"""The level in `levels` that every processor has."""


@dataclass(frozen=True)
class InputGrid:
    """How the inputs of a matrix are rounded.

    Attributes:
        bits: of a code, 2 to 8.
        scale, zero: ``[groups]`` float32, of each group of weights; ``None`` where every token has
            the grid from its least to its largest value.
        reach: ``[1]`` float32, of the factors of tokens; ``None`` where they have none.
    """

    bits: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    reach: Tensor | None = None

    @classmethod
    def of_channels(
        cls,
        bits: int,
        scale: Tensor,
        zero: Tensor,
        qtensor: QTensor,
        reach: Tensor | None = None,
    ) -> InputGrid | None:
        """The grid of channels as the groups of ``qtensor`` meet it.

        Args:
            scale, zero: ``[in]`` float32, in the order of inputs.
            reach: of the factors of tokens, if they have any.

        Returns:
            ``None`` where a group of weights has inputs of several grids.
        """
        if qtensor.in_perm is not None:
            scale, zero = scale[qtensor.in_perm], zero[qtensor.in_perm]
        lengths = list(qtensor.grid.lengths(len(scale)))
        found = []
        for values in (scale, zero):
            groups = values.split(lengths)
            if any(bool((group != group[0]).any()) for group in groups):
                return None
            found.append(torch.stack([group[0] for group in groups]))
        return cls(bits, found[0], found[1], reach)

    def of_inputs(self, x: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each value of ``x``, in its shape."""
        if self.scale is None or self.zero is None:
            low, high = x.aminmax(dim=1, keepdim=True)
            scale, zero = covering(low, high, self.bits)
        else:
            spread = torch.tensor(lengths)
            scale = self.scale.repeat_interleave(spread).unsqueeze(0)
            zero = self.zero.repeat_interleave(spread).unsqueeze(0)
        return scale.expand_as(x), zero.expand_as(x)


def multiplies_integers(qtensor: QTensor) -> bool:
    """Whether the native kernels take ``qtensor``.

    Its groups must run along inputs, and be short enough for 32 bits to hold their sums. Without
    instructions for integers, floats are faster.
    """
    native = backend.native() if qtensor.codes.device.type == "cpu" else None
    if native is None or qtensor.grid.axis != "in" or levels() == [SCALAR]:
        return False
    return max(qtensor.grid.lengths(qtensor.codes.shape[1])) <= int(native.LONGEST_GROUP)


def native_grid(grid: InputGrid) -> Any:
    """``quantine._native.InputGrid``."""
    native = backend.native()
    assert native is not None
    if grid.scale is None or grid.zero is None:
        return native.InputGrid(grid.bits)
    scale, zero = grid.scale.contiguous(), grid.zero.contiguous()
    if grid.reach is None:
        return native.InputGrid(grid.bits, scale, zero)
    return native.InputGrid(grid.bits, scale, zero, *steepness(scale, zero, grid.bits, grid.reach))


def levels() -> list[str]:
    """Instruction sets for `multiply`, the best one first; all find the same bits."""
    native = backend.native()
    return [] if native is None else list(native.integer_levels())


def multiply(matrix: Matrix, grid: Any, x: Tensor, level: str | None = None) -> Tensor:
    """``x @ W.T`` with the inputs rounded to their grid.

    Rows of ``x`` with NaN, or with grids of their own and a range that is not finite, become NaN.

    Args:
        matrix: native, `multiplies_integers`.
        grid: from `native_grid`.
        x: ``[batch, in]`` float32, contiguous.
        level: one of `levels`, if not the best.

    Returns:
        ``[batch, out]`` float32.
    """
    native = backend.native()
    assert native is not None
    result = x.new_empty(len(x), matrix.rows)
    native.multiply_integer(matrix, grid, x, result, level or levels()[0], pool())
    return result


def input_codes(matrix: Matrix, grid: Any, x: Tensor) -> Tensor:
    """The codes that `multiply` multiplies: ``[batch, in]`` uint8, in stored order."""
    native = backend.native()
    assert native is not None
    codes = torch.empty(x.shape, dtype=torch.uint8)
    native.integer_codes(matrix, grid, x, codes, pool())
    return codes


def multiply_reference(qtensor: QTensor, grid: InputGrid, x: Tensor) -> Tensor:
    """The meaning of `multiply`: see the module.

    Sums over a group are exact; products with scales are added in float32, group by group. What
    outliers add to the weights of their codes meets the values that rounded activations stand for.
    """
    stored = x if qtensor.in_perm is None else x[:, qtensor.in_perm]
    lengths = qtensor.grid.lengths(stored.shape[1])
    scale, zero = grid.of_inputs(stored, lengths)
    factor = torch.ones(len(x), 1)
    if grid.reach is not None:
        factor = factors(stored, *steepness(scale, zero, grid.bits, grid.reach))
        stored = stored / factor
    codes = encode(stored.unsqueeze(-1), scale, zero, grid.bits).squeeze(-1)
    weights, added = _without_outliers(qtensor)
    result = torch.zeros(len(x), len(weights))
    parts = zip(
        *(t.split(list(lengths), 1) for t in (weights, codes, scale, zero)),
        qtensor.grid.scales().T,
        qtensor.grid.zeros().T.double(),
        strict=True,
    )
    for c_w, c_x, s_x, z_x, s_w, z_w in parts:
        c_w, c_x, z = c_w.double(), c_x.double(), z_x[:, :1].double()
        sums = c_x @ c_w.T - c_x.sum(1, keepdim=True) * z_w
        sums = sums - z * c_w.sum(1) + c_w.shape[1] * z * z_w
        result += sums.float() * (s_x[:, :1] * s_w)
    if added is not None:
        result += (codes - zero).mul_(scale) @ added.T
    return result * factor


def _without_outliers(qtensor: QTensor) -> tuple[Tensor, Tensor | None]:
    """Codes, and what outliers add to the weights they mean, ``[out, in]`` in stored order."""
    kept = qtensor.outliers
    if kept is None:
        return qtensor.codes, None
    codes, places = qtensor.codes.clone(), (kept.row_indices(), kept.columns)
    if has_exact_zero(qtensor.grid):
        lengths = torch.tensor(qtensor.grid.lengths(codes.shape[1]))
        zeros = qtensor.grid.zeros().repeat_interleave(lengths, 1)
        codes[places] = zeros[places].to(torch.uint8)
    added = torch.zeros(codes.shape)
    added[places] = kept.values.float() - qtensor.grid.decode(codes)[places]
    return codes, added
