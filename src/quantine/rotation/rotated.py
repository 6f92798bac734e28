"""How a model's hidden states and values are rotated without changing what it computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from quantine.core.device import CPU
from quantine.core.transform_spec import ROTATE
from quantine.errors import FamilyError
from quantine.families.family import Family, Link
from quantine.families.heads import Heads
from quantine.families.layers import is_transposed
from quantine.rotation.recipes import Bias, Constant, Matrix, Recipe, Shift, Turn
from quantine.rotation.rotation import Rotation

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BEFORE_MATRICES: Final = ("R1", "R4")
"""Reorders whose producers are norms of hidden states, and whose consumers read what these norm."""
INTO_HIDDEN_STATES: Final = ("R3", "R5")
"""Reorders whose consumers add to hidden states."""
VALUES: Final = "R3"
"""The reorder of values."""
TOLERANCE: Final = 1e-4
"""Largest difference of two norms' outputs, whose numbers are about 1, that are the same."""


@dataclass(frozen=True)
class Rotated:
    """How the tensors of a rotated model are made.

    Attributes:
        recipes: how, by name; a tensor without one stays.
        copies: names of tensors that the files may lack, because they are another in the original,
            and that other's name: a head of its own where the original has that of the table.
    """

    recipes: Mapping[str, Recipe]
    copies: Mapping[str, str]


def rotated(model: PreTrainedModel, family: Family, config: PretrainedConfig, seed: int) -> Rotated:
    """Find out how a model is rotated.

    Hidden states x become x Q: all that adds to them is turned by Q, all that reads them by its
    inverse, and the norms between give their weights and biases to what reads them. Values of each
    head become v R, which the matrix behind attention takes back.

    Args:
        model: only its structure and the classes of its norms matter; weights may be on the meta
            device. Table and head are two parameters.
        family: its architecture.
        config: its configuration.
        seed: of the rotations.

    Raises:
        FamilyError: it cannot be rotated; the message names what is not understood.
    """
    _check_family(family, config)
    norms = _norms_of(model, family)
    kinds = [_mean_is_taken_off(model.get_submodule(path), path) for path in norms]
    hidden = Turn(Rotation(int(config.hidden_size), seed, keeps_ones=any(kinds)))
    maker = _Maker(model, family, Heads.of(config, family), Heads.width(config), hidden, seed)
    return maker.rotated()


def _check_family(family: Family, config: PretrainedConfig) -> None:
    if not family.final_norm or not family.links:
        raise FamilyError(
            f"it is not known where {config.model_type} models read and write their hidden states: "
            f"leave out `{ROTATE}`"
        )
    for field, value in family.links_need:
        if getattr(config, field) != value:
            raise FamilyError(
                f"hidden states can be rotated only where {field} is {value}, not "
                f"{getattr(config, field)}: leave out `{ROTATE}`"
            )


def _norms_of(model: nn.Module, family: Family) -> list[str]:
    """Paths of all norms of hidden states."""
    links = [link for link in family.links if link.kind in BEFORE_MATRICES]
    count = len(list(model.get_submodule(family.blocks).children()))
    inside = [
        f"{family.blocks}.{index}.{path}"
        for index in range(count)
        for link in links
        for path in link.producers
    ]
    return [*inside, family.final_norm]


def _mean_is_taken_off(norm: nn.Module, path: str) -> bool:
    """Whether ``norm`` subtracts the mean over channels, once it is clear what it does.

    Raises:
        FamilyError: rotating its input does not rotate its output, or its weight is no factor and
            its bias no summand of its output.
    """
    parameters = dict(norm.named_parameters())
    tried = copy.deepcopy(norm).to_empty(device=CPU)
    width = next((parameter.shape[0] for parameter in parameters.values()), 0)
    if not width or set(parameters) - {"weight", "bias"}:
        raise _unlike(path, norm)
    generator = torch.Generator("cpu").manual_seed(0)
    x, gain, shift = torch.randn(
        3, 4, width, generator=generator, dtype=torch.float32, device=CPU
    ).unbind()

    def output(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        values = {"weight": weight, "bias": bias}
        with torch.no_grad():
            for name, parameter in tried.named_parameters():
                parameter.copy_(values[name])
            made: torch.Tensor = tried(x)
        return made

    def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
        return not torch.allclose(one, other, atol=TOLERANCE)

    ones, zeros = torch.ones_like(gain[0]), torch.zeros_like(gain[0])
    plain = output(x, ones, zeros)
    scaled = plain * (gain[0] if "weight" in parameters else 1)
    scaled = scaled + (shift[0] if "bias" in parameters else 0)
    takes_off = not differs(output(x + 1, ones, zeros), plain)
    rotation = Rotation(width, 0, keeps_ones=takes_off)
    turned = output(rotation.turned(x), ones, zeros)
    if differs(output(x, gain[0], shift[0]), scaled) or differs(turned, rotation.turned(plain)):
        raise _unlike(path, norm)
    return takes_off


def _unlike(path: str, norm: nn.Module) -> FamilyError:
    return FamilyError(
        f"{path}, a {type(norm).__name__}, is no norm whose weight and bias matrices could take "
        f"over: leave out `{ROTATE}`"
    )


class _Maker:
    """Makes the recipes of a model, see `rotated`."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        heads: Heads,
        head_width: int,
        hidden: Turn,
        seed: int,
    ) -> None:
        self._model, self._family, self._heads, self._hidden = model, family, heads, hidden
        self._head_width, self._values = head_width, Rotation(head_width, seed)
        self._names = {name for name, _ in model.named_parameters()}
        self._recipes: dict[str, Recipe] = {}
        self._untouched: set[str] = set()

    def rotated(self) -> Rotated:
        """The recipes of all tensors, each of which has to be known."""
        family = self._family
        for index in range(len(list(self._model.get_submodule(family.blocks).children()))):
            self._block(f"{family.blocks}.{index}.", family.groups_in(index))
        for table in (family.embedding, family.positions):
            if table:
                self._matrix(table, inputs=self._hidden)
        self._behind_norm(family.final_norm, [family.head], {})
        self._check_all()
        head, table = f"{family.head}.weight", f"{family.embedding}.weight"
        return Rotated(self._recipes, {head: table})

    def _block(self, prefix: str, groups: tuple[tuple[str, ...], ...]) -> None:
        """The recipes of one block, whose names begin with ``prefix``.

        Raises:
            FamilyError: a matrix is none that reads or writes hidden states.
        """
        links = self._family.links
        outputs = {
            f"{prefix}{path}": self._value_rows(link)
            for link in links
            if link.kind == VALUES
            for path in link.producers
        }
        read: set[str] = set()
        for link in links:
            if link.kind in BEFORE_MATRICES:
                readers = [f"{prefix}{path}" for path in link.consumers]
                self._behind_norm(f"{prefix}{link.producers[0]}", readers, outputs)
                read.update(readers)
        written = {
            f"{prefix}{path}": Turn(self._values) if link.kind == VALUES else None
            for link in links
            if link.kind in INTO_HIDDEN_STATES
            for path in link.consumers
        }
        for path, inputs in written.items():
            self._matrix(path, inputs=inputs, outputs=self._hidden)
        matrices = {f"{prefix}{path}" for group in groups for path in group}
        if matrices != read | set(written) or read & set(written):
            odd = min(matrices ^ (read | set(written)), default=prefix)
            raise FamilyError(
                f"{odd} is no matrix that reads or writes hidden states as others do: leave out "
                f"`{ROTATE}`"
            )
        self._untouched.update(f"{prefix}{path}" for path in self._family.untouched)

    def _value_rows(self, link: Link) -> Turn:
        """How the outputs of the matrix that makes values are turned."""
        width, heads = self._head_width, self._heads
        if link.rows == "interleaved":
            return Turn(self._values, parts=heads.queries, last=width)
        return Turn(self._values, last=heads.keys * width if link.rows == "last" else 0)

    def _behind_norm(self, norm: str, readers: list[str], outputs: Mapping[str, Turn]) -> None:
        """The recipes of a norm and of the matrices that read what it puts out.

        Args:
            norm: path of the norm.
            readers: paths of the matrices.
            outputs: how the outputs of some of them are turned.
        """
        gain, shift = f"{norm}.weight", f"{norm}.bias"
        gain = gain if gain in self._names else ""
        shift = shift if shift in self._names else ""
        biased = all(f"{reader}.bias" in self._names for reader in readers)
        for reader in readers:
            turn = outputs.get(reader)
            taken = shift if biased else ""
            self._matrix(reader, gain, self._hidden, turn, taken)
        if gain:
            self._recipes[gain] = Constant(gain, 1)
        if shift:
            stays = Shift(shift, gain, self._hidden)
            self._recipes[shift] = Constant(shift, 0) if biased else stays

    def _matrix(
        self,
        path: str,
        gain: str = "",
        inputs: Turn | None = None,
        outputs: Turn | None = None,
        shift: str = "",
    ) -> None:
        """The recipes of the matrix at ``path`` and of its bias."""
        name, bias = f"{path}.weight", f"{path}.bias"
        transposed = is_transposed(self._model.get_submodule(path))
        matrix = Matrix(name, transposed, gain, inputs, outputs)
        self._recipes[name] = matrix
        if bias in self._names:
            self._recipes[bias] = Bias(bias, matrix, shift)

    def _check_all(self) -> None:
        """Refuse a model with a parameter that might read or write hidden states unnoticed.

        Raises:
            FamilyError: names one.
        """
        beside = ("", *(f".{leaf}" for leaf in ("weight", "bias")))
        known = {f"{path}{end}" for path in self._untouched for end in beside}
        unknown = sorted(self._names - set(self._recipes) - known)
        if unknown:
            raise FamilyError(
                f"{unknown[0]} is neither a norm before matrices nor a matrix that reads or writes "
                f"hidden states: leave out `{ROTATE}`"
            )
