"""How the tensors of a rotated model are made of those of the original, by its wiring."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantine.core.rotation import Rotation
from quantine.core.transform_spec import ROTATE
from quantine.errors import FamilyError
from quantine.families.expert_layout import DOWN
from quantine.families.experts import Experts
from quantine.families.family import Link
from quantine.families.heads import Heads
from quantine.families.layers import is_transposed, matrix_shape
from quantine.rotation.norms import NormKind, norm_kind
from quantine.rotation.recipes import Bias, Constant, Gain, Matrix, Recipe, Shift, Turn
from quantine.rotation.wiring import BlockWiring, Wiring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Rotated:
    """How the tensors of a rotated model are made.

    Attributes:
        recipes: how, by name; a tensor without one stays.
        copies: names of tensors that the files may lack, because they are another in the original,
            and that other's name: a head of its own where the original has that of the table.
        hidden: how hidden states are turned.
        values_stay: paths of the blocks whose values are not turned.
    """

    recipes: Mapping[str, Recipe]
    copies: Mapping[str, str]
    hidden: Turn
    values_stay: tuple[str, ...]


def rotated(model: PreTrainedModel, wiring: Wiring, seed: int) -> Rotated:
    """Find out how a model is rotated.

    Hidden states x become x Q: all that adds to them is turned by Q, all that reads them by its
    inverse, and the norms between give their weights and biases to what reads them. Values of each
    head become v R, which the matrix behind attention takes back.

    Args:
        model: only its structure and the classes of its norms matter; weights may be on the meta
            device. Table and head are two parameters, and experts have modules of their own.
        wiring: what reads and writes its hidden states.
        seed: of the rotations.

    Raises:
        FamilyError: a norm is not understood; the message names it.
    """
    _, width = matrix_shape(model.get_submodule(wiring.family.embedding), wiring.family.embedding)
    kinds = {path: norm_kind(model.get_submodule(path), path, width) for path in wiring.norms()}
    keeps_ones = any(kind.takes_mean_off for kind in kinds.values())
    hidden = Turn(Rotation(width, seed, keeps_ones))
    return _Maker(model, wiring, kinds, hidden, seed).rotated()


def check_known(model: PreTrainedModel, wiring: Wiring, recipes: Iterable[str]) -> None:
    """Refuse a model with a parameter that might read or write hidden states unnoticed.

    Args:
        model: the model.
        wiring: names those parameters that stay.
        recipes: names of those that do not.

    Raises:
        FamilyError: names one of which nothing is known.
    """
    names = {name for name, _ in model.named_parameters()}
    unknown = sorted(names - set(recipes) - wiring.untouched)
    if unknown:
        raise FamilyError(
            f"{unknown[0]} is neither a norm before matrices nor a matrix that reads or writes "
            f"hidden states: leave out `{ROTATE}`"
        )


class _Maker:
    """Makes the recipes of a model, see `rotated`."""

    def __init__(
        self,
        model: PreTrainedModel,
        wiring: Wiring,
        kinds: Mapping[str, NormKind],
        hidden: Turn,
        seed: int,
    ) -> None:
        self._model, self._wiring, self._kinds = model, wiring, kinds
        self._heads = Heads.of(model.config, wiring.family)
        self._hidden, self._seed = hidden, seed
        self._names = {name for name, _ in model.named_parameters()}
        self._recipes: dict[str, Recipe] = {}

    def rotated(self) -> Rotated:
        """The recipes of all tensors that do not stay."""
        family = self._wiring.family
        for index, block in enumerate(self._wiring.blocks):
            self._block(f"{family.blocks}.{index}.", block)
        for table in self._wiring.tables:
            self._matrix(table, inputs=self._hidden)
        self._behind_norm(self._wiring.final_norm, [family.head], {})
        head, table = f"{family.head}.weight", f"{family.embedding}.weight"
        stay = [n for n, block in enumerate(self._wiring.blocks) if block.values is None]
        return Rotated(
            self._recipes,
            {head: table},
            self._hidden,
            tuple(f"{family.blocks}.{index}" for index in stay),
        )

    def _block(self, prefix: str, block: BlockWiring) -> None:
        """The recipes of one block, whose names begin with ``prefix``."""
        inputs: dict[str, Turn] = {}
        outputs = {f"{prefix}{path}": self._hidden for path in block.writers}
        if block.values is not None:
            values = self._of_values(prefix, block.values)
            inputs = {f"{prefix}{path}": Turn(values) for path in block.values.consumers}
            rows = self._value_rows(block.values, values)
            outputs |= {f"{prefix}{path}": rows for path in block.values.producers}
        behind_norms = set()
        for norm, paths in block.readers:
            readers = []
            for path in paths:
                found, written = self._expert_matrices(f"{prefix}{path}")
                readers += found or [f"{prefix}{path}"]
                outputs |= dict.fromkeys(written, self._hidden)
            self._behind_norm(f"{prefix}{norm}", readers, outputs)
            behind_norms.update(readers)
        for path in dict.fromkeys([*inputs, *outputs]):
            if path not in behind_norms:
                self._matrix(path, inputs=inputs.get(path), outputs=outputs.get(path))

    def _expert_matrices(self, path: str) -> tuple[list[str], list[str]]:
        """Paths of the matrices of all experts at ``path``: those that read, those that write."""
        experts = self._model.get_submodule(path)
        if not isinstance(experts, Experts):
            return [], []
        groups = experts.groups(len(experts))
        names = [f"{path}.{name}" for group in groups for name in group]
        written = [name for name in names if name.endswith(f".{DOWN}")]
        return [name for name in names if name not in written], written

    def _of_values(self, prefix: str, link: Link) -> Rotation:
        """The rotation of the values of each head."""
        path = f"{prefix}{link.consumers[0]}"
        _, channels = matrix_shape(self._model.get_submodule(path), path)
        return Rotation(channels // self._heads.queries, self._seed)

    def _value_rows(self, link: Link, values: Rotation) -> Turn:
        """How the outputs of the matrix that makes values are turned."""
        if link.rows == "interleaved":
            return Turn(values, parts=self._heads.keys, last=values.width)
        return Turn(values, last=self._heads.keys * values.width if link.rows == "last" else 0)

    def _behind_norm(self, norm: str, readers: list[str], outputs: Mapping[str, Turn]) -> None:
        """The recipes of a norm and of the matrices that read what it puts out.

        Args:
            norm: path of the norm.
            readers: paths of the matrices.
            outputs: how the outputs of some of them are turned.
        """
        weight, shift = f"{norm}.weight", f"{norm}.bias"
        offset = self._kinds[norm].offset
        gain = Gain(weight, offset) if weight in self._names else None
        shift = shift if shift in self._names else ""
        biased = all(f"{reader}.bias" in self._names for reader in readers)
        for reader in readers:
            taken = shift if biased else ""
            self._matrix(reader, gain, self._hidden, outputs.get(reader), taken)
        if gain is not None:
            self._recipes[weight] = Constant(weight, 1 - offset)
        if shift:
            stays = Shift(shift, gain, self._hidden)
            self._recipes[shift] = Constant(shift, 0) if biased else stays

    def _matrix(
        self,
        path: str,
        gain: Gain | None = None,
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
