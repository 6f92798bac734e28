"""The meaning of `quantine.kernels.integer.multiply`, in plain PyTorch.

A weight is ``s_w * (c_w - z_w)``, with a scale and a zero point for each output and group of
inputs. A rounded activation is ``s_x * (c_x - z_x)``, with a scale and a zero point for each
cluster of inputs or for each token. Where every group of weights lies within one cluster, a group
adds

    s_w * s_x * (sum(c_w * c_x) - z_w * sum(c_x) - z_x * sum(c_w) + n * z_w * z_x)

to an output, with whole sums over its ``n`` inputs. Where tokens have factors
(`quantine.kernels.integer.token_factors`), that is of an activation divided by its token's, and the
output is multiplied by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.grid import decode, encode
from quantine.core.qtensor import QTensor
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.matrix.reference import has_exact_zero


def multiply_reference(qtensor: QTensor, grid: InputGrid, x: Tensor) -> Tensor:
    """``x @ W.T`` with the inputs ``x`` ``[batch, in]`` rounded to ``grid``; ``[batch, out]``.

    Sums over a group are exact; products with scales are added in float32, group by group. What
    outliers add to the weights of their codes meets the values that rounded activations stand for.
    """
    stored = x if qtensor.in_perm is None else x[:, qtensor.in_perm]
    lengths = qtensor.grid.lengths(stored.shape[1])
    scale, zero = grid.of_inputs(stored, lengths)
    factor = x.new_ones(len(x), 1)
    if grid.reach is not None:
        factor = factors(stored, *steepness(scale, zero, grid.bits, grid.reach))
        stored = stored / factor
    codes = encode(stored, scale, zero, grid.bits)
    weights, added = _without_outliers(qtensor)
    result = x.new_zeros(len(x), len(weights))
    parts = zip(
        *(t.split(list(lengths), 1) for t in (weights, codes, scale, zero)),
        qtensor.grid.scales().T,
        qtensor.grid.zeros().T.double(),
        strict=True,
    )
    for c_w, c_x, s_x, z_x, s_w, z_w in parts:
        c_w, c_x, z = c_w.double(), c_x.double(), z_x[:, :1].double()
        sums = c_x @ c_w.T - c_x.sum(1, keepdim=True) * z_w
        sums = sums - z * c_w.sum(1) + c_w.shape[1] * z * z_w
        result += sums.float() * (s_x[:, :1] * s_w)
    if added is not None:
        result += decode(codes, scale, zero) @ added.T
    return result * factor


def _without_outliers(qtensor: QTensor) -> tuple[Tensor, Tensor | None]:
    """Codes, and what outliers add to the weights they mean, ``[out, in]`` in stored order."""
    kept = qtensor.outliers
    if kept is None:
        return qtensor.codes, None
    codes, places = qtensor.codes.clone(), (kept.row_indices(), kept.columns)
    if has_exact_zero(qtensor.grid):
        lengths = torch.tensor(qtensor.grid.lengths(codes.shape[1]), device=codes.device)
        zeros = qtensor.grid.zeros().repeat_interleave(lengths, 1)
        codes[places] = zeros[places].to(torch.uint8)
    added = torch.zeros_like(codes, dtype=torch.float32)
    added[places] = kept.values.float() - qtensor.grid.decode(codes)[places]
    return codes, added
