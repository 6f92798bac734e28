"""Turning modules that round activations into parts of the native decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.activations.modules import SITES_NAME, AttentionSites
from quantine.core.activation_spec import UNQUANTIZED
from quantine.kernels.integer import native_grid
from quantine.kernels.integer.input_grid import InputGrid
from quantine.runtime.decoder_checks import expect, refuse
from quantine.runtime.input_grid import is_plain_grid


@dataclass(frozen=True)
class Roundings:
    """Turns modules that round activations into parts of the native decoder.

    Attributes:
        native: the module ``quantine._native``.
        inputs_made: native roundings of inputs by the numbers of their grids, so that matrices
            whose inputs are equal round them once.
    """

    native: ModuleType
    inputs_made: dict[Any, Any] = field(default_factory=dict)

    def inputs(self, module: nn.Module, channels: int) -> Any:
        """The native ``InputRounding`` of what rounds the inputs of a matrix.

        Args:
            module: one of `quantine.activations.grids`.
            channels: number of inputs.

        Raises:
            BackendUnavailable: it is something else, or of another number of channels.
        """
        if not is_plain_grid(module):
            _unknown("inputs of a matrix", module)
        expect(module, type(module), "a grid", ())
        if isinstance(module, TokenGrid):
            return self._shared(InputGrid(module.bits), [channels])
        scale, zero = module.of_channels()
        if len(scale) != channels:
            refuse(f"a grid is for {len(scale)} channels, not {channels}")
        ends = _ends_of_runs(scale, zero)
        last = torch.tensor(ends, dtype=torch.int64, device="cpu") - 1
        grid = InputGrid(module.bits, scale[last], zero[last], module.reached())
        return self._shared(grid, ends)

    def _shared(self, grid: InputGrid, ends: list[int]) -> Any:
        numbers = (
            None if tensor is None else tuple(tensor.tolist())
            for tensor in (grid.scale, grid.zero, grid.reach)
        )
        key = (grid.bits, *numbers, *ends)
        if key not in self.inputs_made:
            self.inputs_made[key] = self.native.InputRounding(native_grid(grid), ends)
        return self.inputs_made[key]

    def states(self, attention: Any, dim: int, scaling: float) -> Any:
        """The native ``AttentionRounding`` of an attention module; ``None`` if it rounds nothing.

        Args:
            attention: the module, which may hold `AttentionSites`.
            dim: width of a head.
            scaling: factor on products of queries and keys.

        Raises:
            BackendUnavailable: keys and values are not both rounded to static grids, or a site
                rounds in a way that is not known.
        """
        sites = getattr(attention, SITES_NAME, None)
        if sites is None:
            return None
        if getattr(sites, "centre", None) is not None:
            refuse("keys are centred before they are rounded")
        expect(sites, AttentionSites, "what attention rounds", {"query", "key", "value"})
        plain = all(type(site) is nn.Identity for site in (sites.query, sites.key, sites.value))
        if plain and sites.softmax == UNQUANTIZED:
            return None
        for name, site in (("keys", sites.key), ("values", sites.value)):
            if type(site) is not StaticGrid:
                refuse(
                    f"attention rounds, but its {name} have no static grids "
                    f"(a {type(site).__name__})"
                )
        return self.native.AttentionRounding(
            key=self._channels("keys", sites.key, dim),
            value=self._channels("values", sites.value, dim),
            query=(
                None
                if type(sites.query) is nn.Identity
                else self._channels("queries", sites.query, dim)
            ),
            scaling=scaling,
            softmax_bits=sites.softmax,
            relative=sites.relative,
        )

    def _channels(self, what: str, site: nn.Module, dim: int) -> Any:
        if (
            not is_plain_grid(site)
            or not isinstance(site, StaticGrid)
            or site.reached() is not None
            or site.head_reached() is not None
            or site.uneven() is not None
        ):
            _unknown(what, site)
        scale, zero = (values.view(-1, dim) for values in site.of_channels())
        fed = site.fed()
        halves = None if fed is None else fed.contiguous().view(torch.int16)
        return self.native.StateChannels(site.bits, scale, zero, halves)


def _unknown(what: str, module: nn.Module) -> NoReturn:
    refuse(f"{what} are rounded by a {type(module).__name__}")


def _ends_of_runs(scale: Tensor, zero: Tensor) -> list[int]:
    """For channels that follow each other on one grid, the places after the last of each run."""
    pairs = torch.stack([scale, zero], dim=1)
    changes = (pairs[1:] != pairs[:-1]).any(1).nonzero().flatten() + 1
    return [*changes.tolist(), len(scale)]
