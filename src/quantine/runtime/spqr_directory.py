"""Loading directories whose config.json says ``quant_method: spqr``: what Hugging Face calls SpQR.

The loader inside transformers needs a GPU and the package of SpQR's authors, and fails with every
checkpoint since version 5. So quantine translates the configuration into one of its own, and its
own quantizer loads the directory, on any device and in any dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from quantine.core.arithmetic import UNSTATED
from quantine.formats.description import METHOD
from quantine.formats.foreign.spqr.layout import ADDED, ARITHMETIC, MARK
from quantine.formats.foreign.spqr.settings import describe
from quantine.formats.headers import entries_of
from quantine.source.weight_files import weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from quantine.source.model_source import ModelSource


def translated_config(source: ModelSource) -> PretrainedConfig:
    """The model configuration of a SpQR directory, with a ``quantization_config`` of quantine's.

    Raises:
        FormatError: the directory is damaged, or has other settings than the format defines.
    """
    config = source.config()
    settings = config.__dict__.pop("quantization_config")
    added = config.__dict__.pop(MARK, None) == ADDED
    arithmetic = config.__dict__.pop(ARITHMETIC, UNSTATED)
    entries = entries_of(weight_files(source.directory))
    found = describe(settings, added, entries, _linears(source, config))
    config.quantization_config = {"quant_method": METHOD, **found, "arithmetic": arithmetic}
    return config


def _linears(source: ModelSource, config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """The shape ``(out, in)`` of every ``Linear`` of the model, by full name."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in source.bare_model(config).named_modules()
        if isinstance(module, nn.Linear)
    }
