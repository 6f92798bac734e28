"""Rebuilding the modules of blocks that round activations, when a directory is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantine.activations import install
from quantine.activations.linked import linked_family
from quantine.core.activation_spec import activations_from
from quantine.errors import FormatError
from quantine.families.family import Family
from quantine.formats.headers import Entry
from quantine.runtime.placeholder import placeholder
from quantine.runtime.rounding_norm import share_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rebuild(
    model: PreTrainedModel, activations: Mapping[str, Any], entries: Mapping[str, Entry]
) -> Family:
    """Install grids and reordered norms in the blocks of ``model``, without values.

    transformers then loads the values from the files. Matrices that read one rounded input
    share its codes, see `quantine.runtime.shared_input`.

    Args:
        model: the model as transformers builds it, with or without its head.
        activations: how activations are rounded, as config.json has it.
        entries: headers of all tensors in the files, by full name.

    Returns:
        The model's architecture, with the links that its blocks were reordered along.

    Raises:
        FormatError: the files lack a tensor, or the model has no decoder blocks.
    """
    # Directories that do not say it were made when nothing else existed.
    before = {"relative": False, "value_clusters": None, "token_factors": False}
    spec = activations_from({**before, **activations}, "quantization_config")
    family = linked_family(model.config)

    def stored(name: str) -> Tensor | None:
        return _stored(family, name, entries)

    for path in (family.blocks, family.blocks.removeprefix(f"{model.base_model_prefix}.")):
        blocks = dict(model.named_modules()).get(path)
        if isinstance(blocks, nn.ModuleList):
            for index, block in enumerate(blocks):
                own = family.in_block(index)
                install.rebuild_block(block, f"{path}.{index}", own, spec, stored)
                share_inputs(block, own)
            return family
    raise FormatError(f"a model without {family.blocks} has no activations to round")


def _stored(family: Family, name: str, entries: Mapping[str, Entry]) -> Tensor | None:
    """A tensor on the meta device like the one stored as ``name``; ``None`` if there is none.

    Files that save_pretrained wrote for a bare model lack the prefix of the whole one.
    """
    prefix = f"{family.blocks.partition('.')[0]}."
    for candidate in (name, name.removeprefix(prefix), f"{prefix}{name}"):
        if candidate in entries:
            return placeholder(entries[candidate])
    return None
