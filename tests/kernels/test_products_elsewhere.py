"""Products on a device that refuses tensors of the CPU: the same results to the bit.

Every reference, and every choice of a kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_matrices import CLUSTERED, INPUTS, LENGTH, SPECS, quantized, spread_of
from torch import Tensor

from other_device import NAME, check_same, moved
from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import BackendUnavailable
from quantine.kernels import backend, integer, matrix
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.reference import multiply_reference as multiply_codes
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.integer.units.gridded_matrix import gridded_matrix
from quantine.kernels.integer.units.inputs import Norm, normed_reference, round_reference
from quantine.kernels.matrix.reference import multiply_reference
from samples import generator

QTENSORS = {
    "plain": lambda: quantized(QuantSpec(4, LENGTH)),
    "symmetric": lambda: quantized(QuantSpec(4, LENGTH, sym=True)),
    "outliers": lambda: quantized(QuantSpec(4, LENGTH), outliers=True),
    "outliers, fractions": lambda: quantized(SPECS["fractions"], outliers=True),
    "ordered": lambda: quantized(QuantSpec(4, LENGTH), ordered=True),
    "clusters": lambda: quantized(CLUSTERED, outliers=True, ordered=True),
    "second level": lambda: quantized(SPECS["second level of both"]),
}


def inputs_of(batch: int) -> Tensor:
    return torch.randn(batch, INPUTS, generator=generator(7))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kind", [*QTENSORS, "out", "out, outliers"])
def test_products(kind: str, arithmetic: Arithmetic) -> None:
    out = QuantSpec(4, LENGTH, group_axis="out")
    made = {
        **QTENSORS,
        "out": lambda: quantized(out),
        "out, outliers": lambda: quantized(out, True),
    }
    check_same(lambda q, x: multiply_reference(q, x, arithmetic), made[kind](), inputs_of(5))


def grid_of(qtensor: QTensor, rounds: str) -> InputGrid:
    """A grid of the inputs of ``qtensor``."""
    groups = len(qtensor.grid.lengths(INPUTS))
    scale = torch.rand(groups, generator=generator(8)) * 0.02 + 0.01
    zero = torch.randint(90, 160, (groups,), generator=generator(9)).float()
    reach = torch.tensor([0.85]) if rounds == "reach" else None
    return InputGrid(8) if rounds == "token" else InputGrid(8, scale, zero, reach)


@pytest.mark.parametrize("rounds", ["static", "token", "reach"])
@pytest.mark.parametrize("kind", QTENSORS)
def test_products_of_codes(kind: str, rounds: str) -> None:
    qtensor = QTENSORS[kind]()
    check_same(multiply_codes, qtensor, grid_of(qtensor, rounds), inputs_of(6))


@pytest.mark.parametrize("rounds", ["static", "token", "reach"])
@pytest.mark.parametrize("kind", QTENSORS)
def test_matrices_and_inputs_as_gpus_multiply_their_codes(kind: str, rounds: str) -> None:
    def arranged(q: QTensor, grid: InputGrid, norm: Norm, order: Tensor, x: Tensor) -> Any:
        matrix = gridded_matrix(q, grid)
        assert matrix is not None
        inputs = matrix.inputs.gathered(order).after(norm)
        return matrix, round_reference(x, inputs, in_quads=True), normed_reference(x, inputs)

    qtensor = QTENSORS[kind]()
    order = torch.randperm(INPUTS, generator=generator(4))
    norm = Norm(spread_of(INPUTS), spread_of(INPUTS), 1e-5, True)
    check_same(arranged, qtensor, grid_of(qtensor, rounds), norm, order, inputs_of(6))


def test_grids_of_channels_as_groups_meet_them() -> None:
    qtensor, sizes = quantized(CLUSTERED, ordered=True), torch.tensor(CLUSTERED.cluster_sizes)
    stored = torch.arange(4.0).repeat_interleave(sizes)
    assert qtensor.in_perm is not None
    scale = torch.empty(INPUTS)
    scale[qtensor.in_perm] = stored + 1.0

    def met(scale: Tensor, qtensor: QTensor, reach: Tensor) -> InputGrid | None:
        return InputGrid.of_channels(8, scale, scale, qtensor, reach)

    assert check_same(met, scale, qtensor, torch.ones(1)).scale.tolist() == [1, 2, 3, 4]


def test_factors_of_tokens() -> None:
    def found(x: Tensor, scale: Tensor, zero: Tensor, reach: Tensor) -> Tensor:
        return factors(x, *steepness(scale, zero, 8, reach))

    zero = torch.randint(0, 256, (INPUTS,), generator=generator(10)).float()
    check_same(found, inputs_of(5) * 40, torch.rand(INPUTS) + 0.01, zero, torch.tensor([0.7]))


def test_native_matrices_are_not_made_of_it() -> None:
    qtensor = moved(quantized(QuantSpec(4, LENGTH)), NAME)
    x = moved(inputs_of(2), NAME)
    assert matrix.packed_matrix(qtensor) is None
    assert matrix.float_matrix(qtensor.dequantize()) is None
    assert not integer.multiplies_integers(qtensor)
    native = matrix.packed_matrix(quantized(QuantSpec(4, LENGTH)))
    grid = InputGrid(8)
    for refused in (
        lambda: matrix.multiply([native], x, "exact"),
        lambda: matrix.multiply_panels(native, x, "exact"),
        lambda: matrix.read_words(x.long()[0]),
        lambda: integer.multiply(native, integer.native_grid(grid), x),
        lambda: integer.input_codes(native, integer.native_grid(grid), x),
        lambda: integer.native_grid(InputGrid(8, x[0], x[0])),
    ):
        with pytest.raises(BackendUnavailable, match="no native kernel takes tensors on other:0"):
            refused()


def test_a_kernel_is_not_chosen_for_tensors_on_several_devices() -> None:
    x = torch.ones(2)
    assert backend.of(x, None) == "native"
    assert backend.of(moved(x, NAME)) == "reference"
    with pytest.raises(BackendUnavailable, match="cpu, other:0: move them to one device"):
        backend.of(x, moved(x, NAME))
