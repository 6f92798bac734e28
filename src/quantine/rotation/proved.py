"""Proofs on a small model that it computes the same when it is rotated, and not by halves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from torch import Tensor, nn

from quantine.activations.proof import OTHER, SAME
from quantine.core.transform_spec import ROTATE
from quantine.errors import FamilyError
from quantine.families.derivation.derive import Study
from quantine.families.derivation.one_by_one import block_calls, run
from quantine.families.derivation.trace import is_matrix
from quantine.rotation.recipes import Matrix
from quantine.rotation.rotated import Rotated
from quantine.rotation.wiring import Wiring

SAME_LOGITS: Final = 10 * SAME
"""Largest difference of logits, as a share of the largest, that many blocks in float32 explain."""


def prove(studied: Study, wiring: Wiring, made: Rotated) -> None:
    """Check that a small random model, rotated, computes what it did, and only as a whole.

    Each block by itself puts out rotated hidden states where it gets such, and others if one of its
    matrices is left out. So does the model with the same logits, and its tables and its head.
    Single experts are not left out: which of them a text reaches is chance.

    Args:
        studied: the model, which is not changed.
        wiring: says what was rotated, and what was not.
        made: the recipes of its tensors.

    Raises:
        FamilyError: it computes something else, or the same with one matrix left out.
    """
    family, tokens = wiring.family, studied.tokens[0]
    for index, call in enumerate(block_calls(studied.model, family, tokens)):
        prefix = f"{family.blocks}.{index}."
        expected, entering = made.hidden.of(call.output()), made.hidden.of(call.hidden)
        block = _Turned(call.block, prefix, made)
        turned = replace(call, block=block.module, hidden=entering)
        if _share(turned.output(), expected) > SAME:
            raise _unlike(prefix.rstrip("."), _norms_that_stay(studied, wiring, prefix))
        experts = tuple(f"{prefix}{path}." for path in family.experts)
        for name in block.matrices:
            if name.startswith(experts):
                continue
            with block.without(name):
                if _share(turned.output(), expected) < OTHER:
                    raise _idle(name)
    expected = run(studied.model, tokens).logits
    model = _Turned(studied.model, "", made)
    if _share(run(model.module, tokens).logits, expected) > SAME_LOGITS:
        stays = _norms_that_stay(studied, wiring, "")
        raise _unlike(f"a {family.name} model", stays)
    for name in [f"{path}.weight" for path in (*wiring.tables, family.head)]:
        with model.without(name):
            if _share(run(model.module, tokens).logits, expected) < OTHER:
                raise _idle(name)


class _Turned:
    """A copy of a part of a model, with rotated parameters.

    Args:
        part: the part.
        prefix: what the full names of its parameters begin with.
        made: the recipes.

    Attributes:
        module: the copy.
        matrices: full names of the matrices in it that are rotated.
    """

    def __init__(self, part: nn.Module, prefix: str, made: Rotated) -> None:
        self.module = copy.deepcopy(part)
        self._before = {f"{prefix}{name}": value for name, value in part.named_parameters()}
        self._now = {f"{prefix}{name}": value for name, value in self.module.named_parameters()}
        self.matrices: list[str] = []
        for name, parameter in self._now.items():
            recipe = made.recipes.get(name)
            if recipe is not None:
                parameter.copy_(recipe.made(self._before.__getitem__))
            if isinstance(recipe, Matrix):
                self.matrices.append(name)

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """A context in which the parameter ``name`` is not rotated."""
        parameter = self._now[name]
        rotated = parameter.clone()
        parameter.copy_(self._before[name])
        try:
            yield
        finally:
            parameter.copy_(rotated)


def _share(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _norms_that_stay(studied: Study, wiring: Wiring, prefix: str) -> list[str]:
    """Names of parameters that may scale hidden states: of norms, and one for each channel."""
    _, width = studied.model.get_parameter(f"{wiring.family.embedding}.weight").shape
    modules = dict(studied.model.named_modules())
    return [
        name
        for name in sorted(wiring.untouched)
        if name.startswith(prefix)
        and studied.model.get_parameter(name).shape == (width,)
        and not is_matrix(modules[name.rpartition(".")[0]])
    ]


def _unlike(what: str, stays: list[str]) -> FamilyError:
    why = f", as {stays[0]} may read or write hidden states unlike others" if stays else ""
    return FamilyError(
        f"{what} computes something else with rotated hidden states{why}: leave out `{ROTATE}`"
    )


def _idle(name: str) -> FamilyError:
    return FamilyError(
        f"it cannot be proved that {name} has to be rotated, as a small model computes the same "
        f"either way: leave out `{ROTATE}`"
    )
