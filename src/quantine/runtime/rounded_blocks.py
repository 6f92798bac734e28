"""Rebuilding the modules of blocks that round activations, when a directory is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantine.activations.grids import FEEDBACK, REACH, StaticGrid
from quantine.activations.install import RoundingPoint, add_grids, add_norms, add_sites
from quantine.core.activation_spec import ActivationSpec, activations_from
from quantine.errors import FormatError
from quantine.families import family_of
from quantine.families.family import Family
from quantine.formats.shards import Entry
from quantine.runtime.placeholder import placeholder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rebuild(
    model: PreTrainedModel, activations: Mapping[str, Any], entries: Mapping[str, Entry]
) -> None:
    """Install grids and reordered norms in the blocks of ``model``, without values.

    transformers then loads the values from the files.

    Args:
        model: the model as transformers builds it, with or without its head.
        activations: how activations are rounded, as config.json has it.
        entries: headers of all tensors in the files, by full name.

    Raises:
        FormatError: the files lack a tensor, or the model has no decoder blocks.
    """
    # Directories that do not say it were made when nothing else existed.
    before = {"relative": False, "value_clusters": None, "token_factors": False}
    spec = activations_from({**before, **activations}, "quantization_config")
    family = family_of(model.config.model_type)
    for path in (family.blocks, family.blocks.removeprefix(f"{model.base_model_prefix}.")):
        blocks = dict(model.named_modules()).get(path)
        if isinstance(blocks, nn.ModuleList):
            for index, block in enumerate(blocks):
                _Stored(family, spec, f"{path}.{index}", entries).into(block)
            return
    raise FormatError(f"a model without {family.blocks} has no activations to round")


class _Stored:
    """One block as the files describe it.

    Args:
        family: the model's architecture.
        spec: bits, clusters and ranges of activations.
        path: path of the block in the model.
        entries: headers of all tensors in the files, by full name.
    """

    def __init__(
        self, family: Family, spec: ActivationSpec, path: str, entries: Mapping[str, Entry]
    ) -> None:
        self._family, self._spec, self._path = family, spec, path
        self._entries = entries

    def into(self, block: nn.Module) -> None:
        """Install the modules in ``block``, their tensors on the meta device.

        Raises:
            FormatError: the files lack a tensor.
        """
        add_sites(block, self._family, self._spec)
        add_norms(block, self._family, self._spec, lambda path: self._tensor(f"{path}.order"))
        add_grids(block, self._family, self._spec, self._grid)

    def _grid(self, place: RoundingPoint, bits: int) -> StaticGrid:
        scale, zero, labels = (
            self._tensor(f"{place.grid}.{name}") for name in StaticGrid.tensor_names
        )
        more = (self._found(f"{place.grid}.{name}") for name in (FEEDBACK, REACH))
        return StaticGrid(bits, scale, zero, labels, *more)

    def _tensor(self, name: str) -> Tensor:
        found = self._found(name)
        if found is None:
            raise FormatError(
                "config.json says that activations are rounded, but no file holds "
                f"{self._path}.{name}"
            )
        return found

    def _found(self, name: str) -> Tensor | None:
        # Files that save_pretrained wrote for a bare model lack the prefix of the whole one.
        full = f"{self._path}.{name}"
        bare = full.removeprefix(f"{self._family.blocks.partition('.')[0]}.")
        for candidate in (full, bare, f"{self._family.blocks.partition('.')[0]}.{full}"):
            if candidate in self._entries:
                return placeholder(self._entries[candidate])
        return None
