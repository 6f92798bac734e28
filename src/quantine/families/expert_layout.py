"""How experts lie in the fused parameters of transformers, and how these are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

GATE: Final = "gate_proj"
"""Name of an expert's matrix whose outputs are activated, where there are gates."""
UP: Final = "up_proj"
"""Name of an expert's matrix whose outputs are multiplied by those of the gate, or activated."""
DOWN: Final = "down_proj"
"""Name of an expert's last matrix."""
FUSED: Final = "gate_up_proj"
"""Name of the parameter that holds gates and ups of all experts."""
SETTINGS: Final = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
"""Attributes that transformers gives to most modules of fused experts; they say how these lie."""
CHOSEN: Final = ("hidden_states", "top_k_index", "top_k_weights")
"""What experts take where each token chooses some of them."""


@dataclass(frozen=True)
class Layout:
    """Where the matrices of experts are in fused parameters, and what calls the experts.

    Attributes:
        experts: number of experts.
        choices: how many numbers a token may choose among; those behind the experts hand the token
            back as it is.
        has_gate: whether there are gates.
        has_bias: whether each fused parameter has one of biases beside it.
        is_transposed: whether matrices are ``[in, out]`` there.
        in_turn: whether the experts get rows for each of them, as many for each and in their order,
            instead of tokens with the numbers of the experts that these chose. Rows of zeros, whose
            outputs are zeros, are those of tokens that did not choose the expert.
        parts: for each matrix its name, the parameter that it is in, and which outputs of that it
            has.
    """

    experts: int
    choices: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    in_turn: bool
    parts: tuple[tuple[str, str, slice], ...]

    @property
    def hands_back(self) -> bool:
        """Whether there may be numbers behind those of the experts."""
        return self.in_turn or self.choices > self.experts


def layout_of(module: nn.Module) -> Layout | None:
    """How experts lie in ``module``: as its settings say, or else its shapes.

    What computes otherwise than it looks is found out by running it, see
    `quantine.families.derivation.expert_groups.check_experts`.

    Returns:
        ``None`` where it has no fused experts, or has other tensors beside them.
    """
    found: Any = module
    if getattr(found, "has_post_expert_norm", False):
        return None
    if all(hasattr(found, name) for name in SETTINGS):
        layout = _by_settings(found)
    else:
        layout = _by_shapes(found)
    if layout is None:
        return None
    names = {parameter for _, parameter, _ in layout.parts}
    names |= {f"{name}_bias" for name in names} if layout.has_bias else set()
    own = {name for name, _ in module.named_parameters()}
    return layout if own == names and not list(module.buffers()) else None


def _by_settings(fused: Any) -> Layout | None:
    if fused.has_gate and not isinstance(getattr(fused, FUSED, None), nn.Parameter):
        return None
    return Layout(
        experts=fused.num_experts,
        choices=fused.num_experts,
        has_gate=bool(fused.has_gate),
        has_bias=bool(fused.has_bias),
        is_transposed=bool(fused.is_transposed),
        in_turn=False,
        parts=tuple(_parts(fused)),
    )


def _by_shapes(fused: Any) -> Layout | None:
    """The layout of a module with gates and ups in one parameter, which says nothing of it."""
    inputs, last = (fused._parameters.get(name) for name in (FUSED, DOWN))
    if inputs is None or last is None or inputs.ndim != 3 or last.ndim != 3:
        return None
    called = tuple(inspect.signature(fused.forward).parameters)
    in_turn = called == CHOSEN[:1]
    (choices, *matrix), (experts, rows, columns) = inputs.shape, last.shape
    is_transposed = matrix == [columns, 2 * rows]
    if not (in_turn or called == CHOSEN) or not (is_transposed or matrix == [2 * columns, rows]):
        return None
    if choices < experts or (in_turn and choices > experts) or not hasattr(fused, "act_fn"):
        return None
    middle = rows if is_transposed else columns
    parts = (
        (GATE, FUSED, slice(0, middle)),
        (UP, FUSED, slice(middle, None)),
        (DOWN, DOWN, slice(None)),
    )
    return Layout(experts, choices, True, False, is_transposed, in_turn, parts)


def _parts(fused: Any) -> Iterator[tuple[str, str, slice]]:
    """See `Layout.parts`, as the settings of ``fused`` say."""
    if not fused.has_gate:
        yield UP, UP, slice(None)
    elif fused.is_concatenated:
        parameter = fused.get_parameter(FUSED)
        middle = parameter.shape[2 if fused.is_transposed else 1] // 2
        yield GATE, FUSED, slice(0, middle)
        yield UP, FUSED, slice(middle, None)
    else:
        yield GATE, FUSED, slice(0, None, 2)
        yield UP, FUSED, slice(1, None, 2)
    yield DOWN, DOWN, slice(None)
