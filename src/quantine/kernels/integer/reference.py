"""The meaning of `quantine.kernels.integer.multiply`, in plain PyTorch.

A weight with code ``c_w`` is ``s_w * (c_w - z_w)``, with a scale and a zero point for each output
and group of inputs. A rounded activation with code ``c_x`` is ``s_x * (c_x - z_x)``, with a scale
and a zero point for each cluster of inputs or for each token. Where every group of weights lies
within one cluster, a group adds

    s_w * s_x * (sum(c_w * c_x) - z_w * sum(c_x) - z_x * sum(c_w) + n * z_w * z_x)

to an output, with integer sums over its ``n`` inputs. Where tokens have factors
(`quantine.kernels.integer.token_factors`), activations are divided by their token's factor before
they are rounded, and the token's outputs are multiplied by it.
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
    """``x @ W.T`` with the inputs ``x`` rounded to ``grid``.

    Sums over a group are exact; products with scales are added in float32, group by group. An
    outlier counts as the weight of its code plus a correction, which is multiplied in float32 with
    the activations that the codes stand for.

    Args:
        qtensor: the packed weight ``W`` ``[out, in]``, with groups along inputs.
        grid: the grid of its inputs.
        x: ``[batch, in]`` float32, in the order of the model's inputs.

    Returns:
        ``[batch, out]`` float32.
    """
    stored = x if qtensor.in_perm is None else x[:, qtensor.in_perm]
    lengths = qtensor.grid.lengths(stored.shape[1])
    scale, zero = grid.of_inputs(stored, lengths)
    factor = x.new_ones(len(x), 1)
    if grid.reach is not None:
        factor = factors(stored, *steepness(scale, zero, grid.bits, grid.reach))
        stored = stored / factor
    codes = encode(stored, scale, zero, grid.bits)
    weights, added = without_outliers(qtensor)
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


def without_outliers(qtensor: QTensor) -> tuple[Tensor, Tensor | None]:
    """The codes, and what has to be added to the weights they stand for where outliers are.

    Returns:
        Codes ``[out, in]`` uint8 in stored order, those of outliers set to mean zero where the grid
        has an exact zero; and corrections ``[out, in]`` float32, ``None`` without outliers.
    """
    kept = qtensor.outliers
    if kept is None:
        return qtensor.codes, None
    codes, places = qtensor.codes.clone(), (kept.row_indices(), kept.columns)
    if has_exact_zero(qtensor.grid):
        lengths = torch.tensor(
            qtensor.grid.lengths(codes.shape[1]), dtype=torch.int64, device=codes.device
        )
        zeros = qtensor.grid.zeros().repeat_interleave(lengths, 1)
        codes[places] = zeros[places].to(torch.uint8)
    added = torch.zeros_like(codes, dtype=torch.float32)
    added[places] = kept.values.float() - qtensor.grid.decode(codes)[places]
    return codes, added
