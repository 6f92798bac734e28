"""A model whose activations are rounded, with gradients that pass the rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from quantine.activations.grids import HEAD_REACH, REACH, StaticGrid
from quantine.activations.install import RoundingPoint, rebuild_block, rounding_points
from quantine.core.activation_spec import UNQUANTIZED, ActivationSpec
from quantine.core.ambient import without_autocast
from quantine.core.straight_through import straight_through
from quantine.families.family import Family
from quantine.families.layers import block_list
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.kv_attention.state_codes import SMALLEST, as_held
from quantine.tuning.numbers import Numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FRACTIONAL: Final = ("key", "value")
"""The sites whose zero points need not be whole numbers, and so may be tuned."""
NEAREST: Final = 0.5 + 1e-3
"""Steps by which a value within its grid is rounded at most, but for the rounding of floats."""


class StraightGrid(nn.Module):
    """Rounds activations as ``grid`` does; gradients pass it as if it were not there.

    Args:
        grid: one of `quantine.activations.grids`.
    """

    def __init__(self, grid: nn.Module) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` ``[..., channels]``; the result has its shape and dtype."""
        return straight_through(x, self.grid(x.detach()))


class TunedGrid(nn.Module):
    """Rounds activations to a static grid, and gives its scales and zero points gradients.

    A scale has the gradient of LSQ (arXiv 1902.08153): with a larger step a code stands for more,
    but a value asks for a lower code, so what is left is how far the value was rounded. A value
    beyond the ends of its grid has no gradient; the end that it was clipped to has.

    Args:
        grid: the grid at the beginning.
        fractional: whether zero points may be fractions; others stay, as those do whose tokens have
            factors, which have to lie in the code range.
    """

    def __init__(self, grid: StaticGrid, fractional: bool) -> None:
        super().__init__()
        self._grid, feedback = grid, grid.fed()
        self._passed = None if feedback is None else feedback.float()
        self._alone = None if feedback is None else _inverse(feedback)
        widths = grid.uneven()
        # What comes into a channel of 0 bits is beyond its one value.
        self._constant = None if widths is None else (widths == 0)[grid.get_buffer("labels").long()]
        tuned, reach = {"scale": grid.scale}, None
        for leaf, found in ((REACH, grid.reached()), (HEAD_REACH, grid.head_reached())):
            if found is not None:
                # One scale is nothing beside factors of tokens, which take off what it changes.
                reach = found
                tuned = {**(tuned if len(grid.scale) > 1 else {}), leaf: found}
        if fractional and reach is None:
            tuned["zero"] = grid.zero
        for name, value in tuned.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @staticmethod
    def numbers(leaf: str, start: Tensor) -> Numbers:
        """The numbers of the parameter ``leaf``, which begin as ``start``."""
        return Numbers.offsets(start) if leaf == "zero" else Numbers.factors(start)

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` ``[..., channels]``; the result has its shape and dtype."""
        grid, labels = self._grid, self._grid.get_buffer("labels")
        scale, zero = self._now("scale"), self._now("zero")
        reach, head_reach = self._parameters.get(REACH), self._parameters.get(HEAD_REACH)
        grid.refit(
            scale.detach(),
            zero.detach(),
            grid.fed(),
            None if reach is None else reach.detach(),
            None if head_reach is None else head_reach.detach(),
            grid.uneven(),
        )
        reach = head_reach if reach is None else reach
        values = grid.to_grid(x).float()
        rounded = grid.rounded(values.detach())
        step, zeros = scale.index_select(0, labels), zero.index_select(0, labels)
        if reach is not None:
            held = head_reach is not None
            step = step * _token_factors(values.detach(), step, zeros, grid.bits, reach, held)
        with torch.no_grad():
            off = _by_heads(rounded - values, self._alone)
            inside = off.abs() <= NEAREST * step
            if self._constant is not None:
                inside &= ~self._constant
            per_step = torch.where(inside, off, rounded) / step
            per_zero = torch.where(inside, 0.0, -step)
        # These are 0, and have the gradients of the code's value.
        moved = per_step * (step - step.detach()) + per_zero * (zeros - zeros.detach())
        if self._passed is not None:  # what a channel errs less by is not passed on to later ones
            moved = moved + torch.where(inside, _by_heads(moved, self._passed), 0.0)
        exact = torch.where(inside, values, values.detach()) + moved
        return grid.from_grid(straight_through(exact, rounded)).to(x.dtype)

    def _now(self, name: str) -> Tensor:
        """The parameter ``name``, or the tensor of the grid where it is not tuned."""
        tuned = self._parameters.get(name)
        return self._grid.get_buffer(name) if tuned is None else tuned


def _token_factors(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, reach: Tensor, held: bool
) -> Tensor:
    """The factors of tokens, with gradients for what they follow from.

    That is ``reach``, and the scale of the channel that asks for the largest factor.

    Args:
        x: ``[..., channels]`` float32.
        scale, zero: ``[channels]`` float32.
        bits: number of bits of one code.
        reach: ``[heads]`` float32; ``[1]`` where heads have no factors of their own.
        held: whether caches hold the factors, see `quantine.kernels.kv_attention.state_codes`.

    Returns:
        ``[..., channels]`` float32, see `quantine.kernels.integer.token_factors.factors`.
    """
    heads = len(reach)
    values, scale, zero = (part.unflatten(-1, (heads, -1)) for part in (x, scale, zero))
    reach = reach.unsqueeze(-1)
    with torch.no_grad():
        above, below = steepness(scale, zero, bits, reach)
        asked, asking = torch.maximum(values * above, values * below).max(-1, keepdim=True)
        exact = factors(values, above, below)
        found = as_held(exact) if held else exact
        follows = (exact == asked) & (found > SMALLEST) if held else exact == asked
    ends = (scale.detach() / scale).expand(values.shape).gather(-1, asking)
    followed = torch.where(follows, found * (reach / reach.detach()) * ends, found)
    return followed.expand(values.shape).flatten(-2)


def _inverse(feedback: Tensor) -> Tensor:
    """What takes feedback off again, ``[heads, dim, dim]`` float32.

    A channel gives its error times its row of ``feedback`` on to later channels. So changes of
    channels, times this matrix, are what rounding alone changed in each.
    """
    unit = torch.eye(feedback.shape[1], dtype=torch.float64, device=feedback.device)
    passed = feedback.double() + unit
    found: Tensor = torch.linalg.solve_triangular(passed, unit.expand_as(passed), upper=True)
    return found.float()


def _by_heads(x: Tensor, matrices: Tensor | None) -> Tensor:
    """``x`` ``[..., heads * dim]``, each head times its matrix of ``[heads, dim, dim]``, if any."""
    if matrices is None:
        return x
    heads = x.flatten(0, -2).unflatten(-1, matrices.shape[:2]).transpose(0, 1)
    with without_autocast(x.device):
        found: Tensor = heads @ matrices
    return found.transpose(0, 1).reshape(x.shape)


def round_activations(
    model: PreTrainedModel,
    family: Family,
    spec: ActivationSpec,
    tensor_of: Callable[[str], Tensor | None],
) -> None:
    """Let the blocks of ``model`` round activations as a run has decided, for tuning.

    Their norms write reordered channels, so their matrices have to be those of the run. Static
    grids are parameters then. Points that read the same activation have one grid.

    Args:
        model: computes attention with `quantine.activations.attention`, where its family
            attends; changed in place.
        family: its architecture.
        spec: bits, clusters and ranges of activations.
        tensor_of: see `rebuild_block`.
    """
    for index, block in enumerate(block_list(model, family)):
        own = family.in_block(index)
        rebuild_block(block, f"{family.blocks}.{index}", own, spec, tensor_of)
        shared: dict[tuple[str, str], nn.Module] = {}
        for point in rounding_points(own):
            if getattr(spec, point.site) != UNQUANTIZED:
                path, _, leaf = point.grid.rpartition(".")
                parent = block.get_submodule(path)
                key = point.site, point.kind
                if key not in shared:
                    shared[key] = _with_gradients(getattr(parent, leaf), point)
                setattr(parent, leaf, shared[key])


def _with_gradients(grid: nn.Module, point: RoundingPoint) -> nn.Module:
    if isinstance(grid, StaticGrid):
        return TunedGrid(grid, point.site in FRACTIONAL)
    return StraightGrid(grid)
