"""`RotatedCheckpoint`: the float weights of a rotated model, rotated when they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from quantine.rotation.rotated import Rotated
from quantine.source.checkpoint import Checkpoint
from quantine.source.read_record import ReadRecord
from quantine.source.tensor_files import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RotatedCheckpoint(Checkpoint):
    """The tensors of a rotated model, made of those that files hold.

    Records and digests are of what the files hold.

    Args:
        files: see `quantine.source.checkpoint.Checkpoint`.
        model: see there; table and head are not tied.
        rotated: how its tensors are made.
        record: see there.

    Raises:
        CheckpointError: as there.
    """

    def __init__(
        self,
        files: TensorFiles,
        model: PreTrainedModel,
        rotated: Rotated,
        record: ReadRecord | None = None,
    ) -> None:
        super().__init__(files, model, record)
        self._recipes = rotated.recipes
        for name, other in rotated.copies.items():
            if name not in self._stored and other in self._stored:
                self._stored[name] = self._stored[other]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors ``names`` of the rotated model; float32, but for those that stay.

        Raises:
            CheckpointError: as for the original, or a tensor of it is one of which the rotated
                model cannot be made.
        """
        names = list(dict.fromkeys(names))
        needs = {name: self._needs(name) for name in names}
        users = Counter(needed for name in names for needed in set(needs[name]))
        originals = super().read(users)
        made: dict[str, Tensor] = {}
        for name in names:
            made[name] = self._made(name, originals)
            for needed in set(needs[name]):  # what nothing else is made of need not stay in memory
                users[needed] -= 1
                if not users[needed]:
                    del originals[needed]
        return made

    def _needs(self, name: str) -> tuple[str, ...]:
        recipe = self._recipes.get(name)
        return (name,) if recipe is None else recipe.needs

    def _made(self, name: str, originals: Mapping[str, Tensor]) -> Tensor:
        recipe = self._recipes.get(name)
        return originals[name] if recipe is None else recipe.made(originals.__getitem__)
