"""The matrices of a block: which of them read the same input, and what stays in 16 bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import prod
from typing import Final

from torch import nn

from quantine.errors import FamilyError, cut
from quantine.families.derivation.expert_groups import why_router
from quantine.families.derivation.trace import Trace, is_matrix
from quantine.families.experts import experts_in

HARMLESS: Final = frozenset(
    [
        *("__getitem__", "contiguous", "expand", "flatten", "float", "reshape", "squeeze", "to"),
        *("transpose", "type", "unsqueeze", "view", "abs", "add", "cos", "div", "exp", "mul"),
        *("neg", "sigmoid", "sin", "softplus", "sub", "tanh", "__add__", "__mul__", "__neg__"),
        *("__radd__", "__rmul__", "__rsub__", "__sub__", "conv1d", "conv2d", "embedding"),
    ]
)
"""Names of functions of PyTorch that may read parameters which stay in 16 bit: they look rows up,
convolve, or compute number by number. What any other function reads may be a matrix."""
NARROW: Final = 32
"""Most outputs, or inputs, of a matrix outside of Linear modules that stays in 16 bit however large
the rest of its block is."""
FEW: Final = 0.1
"""Most of a block's weights that all its matrices outside of Linear modules, other than narrow
ones, may be to stay in 16 bit; the reason says how much they are. More would be much of a block, of
which a user hears before anything is quantized."""


def groups_of(prefix: str, kept: dict[str, str], trace: Trace) -> tuple[tuple[str, ...], ...]:
    """The groups of a block, see `quantine.families.family.Family.groups`.

    Matrices of one group follow each other and read the same tensor.

    Args:
        prefix: full path of the block.
        kept: parameters that are not quantized, by path inside of blocks.
        trace: of a forward pass.
    """
    inside = [
        (product.name.removeprefix(f"{prefix}."), product.input)
        for product in trace.products
        if product.name.startswith(f"{prefix}.")
    ]
    inside = [one for one in inside if f"{one[0]}.weight" not in kept]
    runs = groupby(inside, key=lambda one: one[1])
    return tuple(tuple(path for path, _ in products) for _, products in runs)


def kept_in(
    block: nn.Module, prefix: str, trace: Trace, shapes: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Parameters of two or more dimensions in a block that stay in 16 bit, with the reasons.

    Args:
        block: the block, of a small model.
        prefix: its full path.
        trace: of a forward pass.
        shapes: those of the parameters of the model itself, by their full names.

    Returns:
        The reasons by path inside the block.

    Raises:
        FamilyError: a parameter may be a matrix, but not one that can be quantized.
    """
    modules, experts, found = dict(block.named_modules()), experts_in(block), {}
    outside: list[str] = []
    for path, parameter in block.named_parameters():
        owner = path.rpartition(".")[0]
        if parameter.ndim < 2 or any(path.startswith(f"{one}.") for one in experts):
            continue
        reason = why_router(path, block, experts)
        if reason:
            found[path] = reason
            continue
        uses = trace.uses.get(f"{prefix}.{path}", set())
        if path == f"{owner}.weight" and is_matrix(modules[owner]):
            reason = _why_kept(modules, owner, prefix, uses, trace)
            if reason:
                found[path] = reason
            continue
        unknown = _unknown(uses)
        narrow = (
            parameter.ndim == 2 and min(shapes.get(f"{prefix}.{path}", parameter.shape)) <= NARROW
        )
        if unknown and narrow:
            found[path] = f"in no Linear module, and only {NARROW} wide or less"
        elif unknown:
            outside.append(path)
        else:
            found[path] = "no matrix of a product" if uses else "not used for text alone"
    if outside:
        found.update(_few(block, prefix, outside, trace, shapes))
    return found


def _unknown(uses: set[str]) -> set[str]:
    """Those of the functions that read a parameter which may multiply by it."""
    return {use for use in uses if not use.startswith(".")} - HARMLESS


def _few(
    block: nn.Module,
    prefix: str,
    paths: Sequence[str],
    trace: Trace,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, str]:
    """Why parameters that may be matrices outside of Linear modules stay in 16 bit.

    Args:
        block, prefix, trace, shapes: see `kept_in`.
        paths: of the parameters, inside the block; at least one.

    Raises:
        FamilyError: together they are more than `FEW` of the weights of the block.
    """
    sizes = {
        path: prod(shapes.get(f"{prefix}.{path}", parameter.shape))
        for path, parameter in block.named_parameters()
        if parameter.ndim >= 2
    }
    share = sum(sizes[path] for path in paths) / sum(sizes.values())
    if share <= FEW:
        return dict.fromkeys(paths, f"in no Linear module; with its like {share:.1%} of its block")
    path = paths[0]
    functions = cut(", ".join(sorted(_unknown(trace.uses[f"{prefix}.{path}"]))), 60)
    raise FamilyError(
        f"{prefix}.{path} {tuple(block.get_parameter(path).shape)} in a "
        f"{type(block.get_submodule(path.rpartition('.')[0])).__name__} is used by {functions}: "
        f"matrices outside of Linear modules are not supported yet where they are more than "
        f"{FEW:.0%} of a block, and here they are {share:.0%}"
    )


def _why_kept(
    modules: dict[str, nn.Module], path: str, prefix: str, uses: set[str], trace: Trace
) -> str | None:
    """Why the matrix of the module at ``path`` cannot be quantized; ``None`` if it can.

    Raises:
        FamilyError: it did not run although others in the same list did, as experts do.
    """
    if uses:
        return f"read outside of its module, too ({cut(', '.join(sorted(uses)), 60)})"
    if f"{prefix}.{path}" in trace.unlike:
        return f"its {type(modules[path]).__name__} does not only multiply"
    runs = sum(product.name == f"{prefix}.{path}" for product in trace.products)
    if runs > 1:
        return f"it runs {runs} times in one pass"
    if f"{prefix}.{path}" in trace.calls:
        return None
    parents = [path.rsplit(".", depth)[0] for depth in range(1, path.count(".") + 1)]
    if any(isinstance(modules[parent], nn.ModuleList) for parent in parents):
        raise FamilyError(f"{prefix}.{path} did not run: experts in lists are not supported yet")
    return "not used for text alone"
