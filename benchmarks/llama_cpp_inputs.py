"""What both comparisons with llama.cpp's quantizer start from: a model, and inputs of matrices."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantine.calibrate.segments import Calibration, calibration_segments
from quantine.eval.perplexity import Windows, cut_windows
from quantine.families import family_of
from quantine.families.layers import Layer, find_layers
from quantine.formats.foreign.gguf.metadata import architecture_of
from quantine.runtime.load import load_model
from quantine.source.gguf.weights import model_names
from quantine.source.locate import locate
from quantine.source.model_source import ModelSource

TARGETS: Final = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
"""Files that are compared, by llama.cpp's names."""
TEXT: Final = "builtin"
"""The text that both quantizers learn from, and whose held-out part they are measured on."""


def arguments_of(description: str, windows: int) -> argparse.ArgumentParser:
    """The arguments that both programs have.

    Args:
        description: of the program.
        windows: how many of the held-out text are used where nothing else is asked for.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("json", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--window", type=int, default=512)
    return parser


def held_out(source: ModelSource, window: int, count: int) -> Windows:
    """The first windows of the held-out text, as `quantine.evaluate` cuts them."""
    return cut_windows(source, TEXT, window, count, source.config().vocab_size)


@dataclass(frozen=True)
class Inputs:
    """A float model that is run on calibration text.

    Attributes:
        source: of the model.
        model: with its weights.
        stored: llama.cpp's names of tensors, by the model's.
        layers: the matrices of its blocks.
    """

    source: ModelSource
    model: Any
    stored: dict[str, str]
    layers: list[Layer]

    @classmethod
    def of(cls, name: str, dtype: torch.dtype) -> Inputs:
        """Load the model that is called ``name``."""
        source = locate(name)
        config, model = source.config(), load_model(source, dtype)
        architecture = architecture_of(config)
        assert architecture is not None
        stored = {name: gguf for gguf, name in model_names(architecture, model).items()}
        layers = find_layers(model, family_of(config))
        return cls(source, model, stored, [layer for layer in layers if layer.role == "block"])

    def calibration(self, samples: int, text: str = TEXT) -> Tensor:
        """What `quantine quantize --calibration TEXT --samples` takes, ``[samples, length]``."""
        config = self.source.config()
        known = self.source.tokenizer(), config.vocab_size
        longest = getattr(config, "max_position_embeddings", None)
        return calibration_segments(Calibration(text, samples), *known, longest)

    @torch.no_grad()
    def observe(self, windows: Tensor, watch: Callable[[Layer, Tensor], None]) -> None:
        """Run the model on ``windows``, and show each matrix's inputs ``[tokens, in]``."""
        handles = list(self._watched(watch))
        for window in windows:
            self.model.base_model(window[None])
        for handle in handles:
            handle.remove()

    def _watched(self, watch: Callable[[Layer, Tensor], None]) -> Iterator[Any]:
        for layer in self.layers:
            yield layer.observe(
                self.model, lambda x, layer=layer: watch(layer, x.flatten(0, -2).float())
            )
