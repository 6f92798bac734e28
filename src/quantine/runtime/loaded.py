"""What a quantized directory holds, checked once, right after its tensors are read.

Kernels take places from what files hold: columns and gaps of outliers, orders of channels, labels
of clusters. This is where all of it is checked; afterwards it is relied upon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from quantine.activations.centred_keys import CENTRE_NAME
from quantine.activations.grids import StaticGrid
from quantine.activations.modules import AttentionSites, PermutedNorm
from quantine.core.finite import is_finite
from quantine.errors import FormatError
from quantine.families.family import Family
from quantine.families.heads import Heads
from quantine.families.layers import INPUTS_NAME
from quantine.runtime.packed import Packed
from quantine.source.settings import check_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_loaded(model: PreTrainedModel, family: Family | None) -> None:
    """Refuse a model whose tensors or settings for generation are not what docs/format.md says.

    Codes of weights are not read, as any are valid, and neither are float matrices. What
    transformers has put on disk or left without memory is passed over.

    Args:
        model: with packed modules, grids and reordered norms in place, its tensors read.
        family: its architecture, where activations are rounded.

    Raises:
        FormatError: names the tensor.
        CheckpointError: names the field of generation_config.json.
    """
    generation = getattr(model, "generation_config", None)  # a bare model has none
    if generation is not None:
        check_generation(generation)
    for name, module in model.named_modules():
        if any(tensor.is_meta for tensor in module.buffers(recurse=False)):
            continue
        if isinstance(module, Packed | PermutedNorm):
            module.check(name)
        if isinstance(module, AttentionSites) and family is not None:
            _check_sites(name, module, Heads.of(model.config, family), Heads.width(model.config))
        inputs = getattr(module, INPUTS_NAME, None)
        if isinstance(inputs, StaticGrid):
            inputs.check(f"{name}.{INPUTS_NAME}", int(module.in_features))
        _check_vectors(name, module)


def _check_sites(name: str, sites: AttentionSites, heads: Heads, width: int) -> None:
    counts = {"query": heads.queries, "key": heads.keys, "value": heads.keys}
    for site, count in counts.items():
        grid = getattr(sites, site)
        if isinstance(grid, StaticGrid):
            grid.check(f"{name}.{site}", count * width, count)
    if sites.centre is not None:
        sites.centre.check(f"{name}.{CENTRE_NAME}", heads.keys, width)


def _check_vectors(name: str, module: nn.Module) -> None:
    """Refuse biases and weights of norms that are not finite."""
    for leaf, parameter in module.named_parameters(recurse=False):
        floats = parameter.ndim == 1 and parameter.is_floating_point() and not parameter.is_meta
        if floats and parameter.numel() and not is_finite(parameter.detach()):
            raise FormatError(f"{name}.{leaf} holds values that are not finite: it is damaged")
