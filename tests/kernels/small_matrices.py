"""Small weights and matrices of all kinds of groups, for tests of kernels on several devices."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec
from quantine.kernels import fit
from quantine.kernels.fit.grid_cost import GridCost
from samples import generator, random_weight

ROWS, INPUTS, LENGTH = 24, 48, 8
SPECS = {
    "whole zero points": QuantSpec(3, LENGTH),
    "symmetric": QuantSpec(4, LENGTH, sym=True),
    "fractions": QuantSpec(3, LENGTH, zero_bits=16),
    "second level": QuantSpec(3, LENGTH, scale_bits=3, stat_group_size=16),
    "second level of both": QuantSpec(3, LENGTH, scale_bits=3, zero_bits=3, stat_group_size=-1),
}
CLUSTERED = QuantSpec(4, 0, cluster_sizes=(20, 1, 17, 10))


def spread_of(inputs: int) -> Tensor:
    return torch.rand(inputs, generator=generator(3)) + 0.1


def quantized(spec: QuantSpec, outliers: bool = False, ordered: bool = False) -> QTensor:
    """A matrix ``[ROWS, INPUTS]`` rounded to nearest."""
    weight = random_weight(ROWS, INPUTS)
    if spec.group_axis == "in":
        grid = fit.fit_rows(weight, torch.ones(INPUTS), spec, GridCost("minmax"))
    else:
        groups = weight.unflatten(0, (-1, spec.group_length(ROWS)))
        grid = fit.fit_groups(groups, torch.ones(INPUTS), spec, GridCost("minmax"))
    kept = Csr.where(weight.abs() > 0.1, weight) if outliers else None
    order = torch.randperm(INPUTS, generator=generator(4)) if ordered else None
    return QTensor(grid.encode(weight), grid, order, kept)
