"""GPTQ (arXiv 2210.17323): rounding with error feedback.

Columns are rounded one after another; what a column loses is made up by the columns still to
come, weighted by the inverse Hessian of the layer's input (equations 2 and 3, in the Cholesky
form of section 3.3). Updates inside a block of columns are applied at once, those to the columns
behind it in one matrix product (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from quantine.core.observe import Factor, Hessian
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.errors import PlanError, SolverError
from quantine.methods.clip import CLIPS, Clip, fit_groups
from quantine.methods.rtn import fit_grid, make_grid

Groups = Literal["static", "refit"]
GridsOf = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""``(part, columns) -> (scales, zeros)``, float32 ``[part, out]``."""
GROUPS: Final[tuple[Groups, ...]] = ("static", "refit")


@dataclass(frozen=True)
class GPTQ:
    """Rounding with error feedback.

    Attributes:
        damp: share of the Hessian's mean diagonal added to its diagonal.
        act_order: round the inputs with the largest second moment first.
        groups: ``"static"`` fits grids to the original weights, over consecutive inputs, before
            the loop; no order needs to be stored. ``"refit"`` fits each group when the loop
            reaches it, over inputs in solving order; with ``act_order`` that order is stored.
        block_size: columns per lazy update; affects speed only, up to float rounding.
        clip: how a group's range is chosen, see `quantine.methods.clip`.
    """

    damp: float = 0.01
    act_order: bool = True
    groups: Groups = "static"
    block_size: int = 128
    clip: Clip = "mse"
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("groups", self.groups, GROUPS)
        check_choice("clip", self.clip, CLIPS)
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp must be above 0 and at most 1, not {self.damp!r}")
        if self.block_size < 1:
            raise PlanError(f"block_size must be positive, not {self.block_size!r}")

    @property
    def stores_order(self) -> bool:
        """Where groups are made of inputs in solving order."""
        return self.act_order and self.groups == "refit"

    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Solve ``weight`` ``[out, in]`` float32.

        Raises:
            SolverError: no Hessian, or it cannot be factored.
        """
        if hessian is None or hessian.tokens == 0:
            raise SolverError("GPTQ needs calibration inputs, but none were observed")
        factor = hessian.factor(self.damp, self.act_order)
        if self.groups == "static":
            return self._solve_static(weight, factor, spec)
        return self._solve_refit(weight, factor, spec)

    def _solve_static(self, weight: Tensor, factor: Factor, spec: QuantSpec) -> QTensor:
        grid = fit_grid(weight, spec, self.clip)
        group_of = factor.order // grid.group_size
        scales, zeros = grid.scale.float().T.contiguous(), grid.zeros().T.contiguous()

        def grids(part: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
            return scales[group_of[part]], zeros[group_of[part]]

        # Any cut of the columns will do: their grids are known beforehand.
        stored = self._solve_columns(weight, factor, spec.bits, self.block_size, grids)
        codes = torch.empty_like(stored)
        codes[factor.order] = stored
        return QTensor(codes.T.contiguous(), grid)

    def _solve_refit(self, weight: Tensor, factor: Factor, spec: QuantSpec) -> QTensor:
        length = spec.group_length(weight.shape[1])
        fits: list[tuple[Tensor, Tensor]] = []

        def grids(part: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
            if part.start % length == 0:
                members = columns[part.start : part.start + length].T.unsqueeze(1)
                fits.append(fit_groups(members, spec.bits, spec.sym, self.clip))
            scale, zero = fits[-1]
            width = part.stop - part.start
            return scale.T.expand(width, -1), zero.T.expand(width, -1)

        stored = self._solve_columns(weight, factor, spec.bits, length, grids)
        scale = torch.cat([scale for scale, _ in fits], 1)
        zero = torch.cat([zero for _, zero in fits], 1)
        grid = make_grid(scale, zero, spec, length)
        in_perm = factor.order if self.stores_order else None
        return QTensor(stored.T.contiguous(), grid, in_perm)

    def _solve_columns(
        self, weight: Tensor, factor: Factor, bits: int, length: int, grids: GridsOf
    ) -> Tensor:
        """Codes ``[in, out]`` uint8 of all columns, in solving order."""
        # Transposed, so that a column of the matrix is contiguous; indexing copies the weight.
        columns = weight.T[factor.order]
        codes = torch.empty(columns.shape, dtype=torch.uint8)
        errors = torch.empty_like(columns)
        upper = factor.upper
        for block in _blocks(len(columns), length, self.block_size):
            for part in block:
                codes[part], errors[part] = _round_columns(
                    columns[part], upper[part, part], *grids(part, columns), bits
                )
                rest = slice(part.stop, block[-1].stop)
                columns[rest].addmm_(upper[part, rest].T, errors[part], alpha=-1)
            done, behind = slice(block[0].start, block[-1].stop), slice(block[-1].stop, None)
            columns[behind].addmm_(upper[done, behind].T, errors[done], alpha=-1)
        return codes


def _blocks(count: int, length: int, block_size: int) -> list[list[slice]]:
    """Cut ``count`` columns into blocks of about ``block_size``, of parts inside one group.

    A group of ``length`` columns always starts a part, when every update before it is applied.
    """
    parts = [
        slice(start, min(start + block_size, group + length, count))
        for group in range(0, count, length)
        for start in range(group, min(group + length, count), block_size)
    ]
    blocks: list[list[slice]] = []
    for part in parts:
        if not blocks or part.stop - blocks[-1][0].start > block_size:
            blocks.append([])
        blocks[-1].append(part)
    return blocks


def _round_columns(
    current: Tensor, local: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Round columns one by one, feeding each one's error to those behind it, in place.

    Args:
        current: ``[n, out]`` float32, the matrix transposed.
        local: ``[n, n]`` their part of the factor of the inverse Hessian.
        scales, zeros: ``[n, out]`` float32, the grid of each column.

    Returns:
        Codes ``[n, out]`` uint8 and scaled errors ``[n, out]`` float32.
    """
    top = 2**bits - 1
    codes = torch.empty(current.shape, dtype=torch.uint8)
    errors = torch.empty_like(current)
    diagonal = local.diagonal().tolist()
    for j, (column, scale, zero) in enumerate(zip(current, scales, zeros, strict=True)):
        code = torch.div(column, scale).round_().add_(zero).clamp_(0, top)
        codes[j] = code
        decoded = code.sub_(zero).mul_(scale)
        torch.sub(column, decoded, out=errors[j]).div_(diagonal[j])
        current[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
    return codes, errors
