"""Every reference of a kernel on a device that refuses tensors of the CPU, and every choice of it.

The results are those of the CPU to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from other_device import NAME, OtherDevice, OtherTensor, StrayTensor, check_same, moved
from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import GROUP_AXES, GroupAxis, QuantSpec
from quantine.errors import BackendUnavailable
from quantine.kernels import backend, bits, columns, fit, gram, integer, matrix
from quantine.kernels.bits.reference import pack_reference, unpack_reference
from quantine.kernels.columns.columns import AtReach, Columns
from quantine.kernels.columns.reference import round_block_reference
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import CLIPS, Clip, GridCost
from quantine.kernels.fit.reference import fit_groups_reference
from quantine.kernels.gram.reference import add_gram_reference
from quantine.kernels.integer.input_grid import InputGrid
from quantine.kernels.integer.reference import multiply_reference as multiply_codes
from quantine.kernels.integer.token_factors import factors, steepness
from quantine.kernels.integer.units.gridded_matrix import gridded_matrix
from quantine.kernels.integer.units.inputs import Norm, normed_reference, round_reference
from quantine.kernels.kv_attention import attend
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.packing import (
    pack_states,
    pack_states_reference,
    round_states,
)
from quantine.kernels.kv_attention.reference import attend_reference
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.tiled import attend_in_tiles
from quantine.kernels.matrix.reference import multiply_reference
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


# The device itself.


@pytest.mark.parametrize(
    "meet",
    [
        lambda x, stray: x + stray,
        lambda x, stray: x.add_(stray),
        lambda x, stray: stray.add_(x),
        lambda x, stray: x @ stray,
        lambda x, stray: torch.where(x > 0, x, stray),
        lambda x, stray: torch.cat([x, stray]),
        lambda x, stray: x[stray.long().flatten() * 0],
        lambda x, stray: torch.equal(x, stray),
        lambda x, stray: torch.mul(x, x, out=stray),
        lambda x, stray: bits.unpack(x.byte(), 2, 4) + stray.byte(),
    ],
)
def test_a_stray_tensor_of_the_cpu_is_refused(meet: Any) -> None:
    x, stray = moved(torch.ones(4, 4), NAME), torch.ones(4, 4)
    assert meet(x, moved(stray, NAME)) is not None
    with pytest.raises(StrayTensor, match=r"float32|int64|uint8"):
        meet(x, stray)


def test_tensors_of_the_device_are_made_there_share_memory_and_come_back() -> None:
    device = torch.device(NAME)
    with OtherDevice():
        made = [
            torch.zeros(2, device=device),
            torch.arange(3, device=device),
            torch.tensor([1, 2], device=device),
            torch.eye(2, device=device),
            torch.full((2,), 1.5, device=device),
            torch.empty(2, device="cpu").to(device),
        ]
        for tensor in made:
            assert isinstance(tensor, OtherTensor)
            assert tensor.device.type == NAME
            assert tensor.new_ones(1).device.type == NAME
            assert not isinstance(tensor.cpu(), OtherTensor)
        x = torch.zeros(3, 4, device=device)
        x[1:, 2] += 5.0
        x.T[0].copy_(torch.ones(3))
        torch.add(x[0], 1.0, out=x[0])
    assert x.cpu().tolist() == [[2, 1, 1, 1], [1, 0, 5, 0], [1, 0, 5, 0]]


# Codes of a few bits.


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("pair", [(pack_reference, unpack_reference), (bits.pack, bits.unpack)])
def test_bits(width: int, pair: Any) -> None:
    pack, unpack = pair
    codes = torch.randint(0, 2**width, (5, 13), generator=generator(1), dtype=torch.uint8)
    packed = check_same(lambda codes: pack(codes, width), codes)
    assert torch.equal(check_same(lambda packed: unpack(packed, width, 13), packed), codes)


# Grids of groups.


@pytest.mark.parametrize("of", [fit_groups_reference, fit.fit_groups])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("axis", GROUP_AXES)
@pytest.mark.parametrize("name", SPECS)
def test_fits(name: str, axis: GroupAxis, clip: Clip, of: Any) -> None:
    spec = QuantSpec(**{**vars(SPECS[name]), "group_axis": axis})
    groups = random_weight(6 * LENGTH, ROWS).unflatten(0, (-1, LENGTH))
    spread = spread_of(6 * LENGTH).unflatten(0, (-1, LENGTH))
    spread = spread if axis == "in" else spread_of(ROWS)
    for cost in (GridCost(clip), GridCost(clip, 1e-3, look_ahead=True)):
        check_same(lambda c, s, cost=cost: of(c, s, spec, cost), groups, spread)


@pytest.mark.parametrize("spec", [QuantSpec(4, LENGTH), CLUSTERED])
def test_grids_of_rows(spec: QuantSpec) -> None:
    weight, spread = random_weight(ROWS, INPUTS), spread_of(INPUTS)
    check_same(lambda w, s: fit.fit_rows(w, s, spec, GridCost("mse")), weight, spread)


def test_codes_on_second_grids_that_are_known() -> None:
    spec = SPECS["second level of both"]
    groups = random_weight(2 * LENGTH, ROWS).unflatten(0, (-1, LENGTH))
    spread, cost = spread_of(2 * LENGTH).unflatten(0, (-1, LENGTH)), GridCost("hessian")
    grid = fit_groups_reference(groups, spread, spec, cost)
    second = grid.scale.grid, grid.zero_point.grid  # type: ignore[union-attr]
    check_same(
        lambda *args: fit_groups_reference(*args[:2], spec, cost, args[2]), groups, spread, second
    )


# The column loop.


def known(price: float, weight: Tensor, upper: Tensor, order: Tensor) -> Columns:
    grid = fit_groups_reference(
        weight.T.unflatten(0, (-1, LENGTH)),
        weight.new_ones(INPUTS // LENGTH, LENGTH),
        SPECS["whole zero points"],
        GridCost("minmax"),
    )
    values = grid.scales().T.contiguous(), grid.zeros().T.contiguous()
    return Columns.of(weight, upper, order, 3, values, order // LENGTH, price)


def reached(price: float, weight: Tensor, upper: Tensor, order: Tensor, spec: QuantSpec) -> Columns:
    spread, cost = upper.diagonal().contiguous(), GridCost("hessian", price, True)
    if spec.group_axis == "in":
        fitted = FittedGroups.empty(INPUTS // LENGTH, ROWS, LENGTH, spec, weight.device)
        values = fitted.scale.values, fitted.zero.values
        groups = torch.arange(INPUTS, device=weight.device) // LENGTH
    else:
        runs = (weight.new_full((INPUTS, ROWS // LENGTH), value) for value in (0.01, -1.0))
        second = Grid(*runs, 3, 1) if spec.second_level else None
        fitted = FittedGroups.of_columns(INPUTS, ROWS, spec, (second, None), weight.device)
        values = weight.new_empty(1, ROWS), weight.new_empty(1, ROWS)
        groups = torch.zeros_like(order)
    at_reach = AtReach(fitted, spread, cost)
    return Columns.of(weight, upper, order, spec.bits, values, groups, price, at_reach)


@pytest.mark.parametrize("of", [round_block_reference, columns.round_block])
@pytest.mark.parametrize("price", [math.inf, 1e-4])
@pytest.mark.parametrize("kind", ["known", *SPECS, "out", "out, second level"])
def test_columns(kind: str, price: float, of: Any) -> None:
    def rounded(weight: Tensor, upper: Tensor, order: Tensor) -> list[Any]:
        if kind == "known":
            started = known(price, weight, upper, order)
        else:
            out = QuantSpec(3, LENGTH, group_axis="out")
            second = QuantSpec(3, LENGTH, scale_bits=3, stat_group_size=1, group_axis="out")
            spec = {**SPECS, "out": out, "out, second level": second}[kind]
            started = reached(price, weight, upper, order, spec)
        of(started, 0, 16)
        of(started, 16, INPUTS)
        found = started.at_reach
        grid = None if found is None else found.fitted.grid()
        if found is not None and found.fitted.given:  # room for codes of second grids is left empty
            grid = [found.fitted.scale.values, found.fitted.zero.values]
        return [started.weights, started.codes, started.errors, grid, started.kept]

    upper = torch.randn(INPUTS, INPUTS, generator=generator(2)).triu(1) * 0.1 + torch.eye(INPUTS)
    order = torch.randperm(INPUTS, generator=generator(5))
    found = check_same(rounded, random_weight(ROWS, INPUTS), upper, order)
    kept = found[-1]
    assert (kept is None) == (price == math.inf)
    assert kept is None or 0 < int(kept.sum()) < kept.numel()


# Sums of products of inputs.


@pytest.mark.parametrize("of", [add_gram_reference, gram.add_gram])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram(dtype: torch.dtype, of: Any) -> None:
    def total(x: Tensor) -> Tensor:
        result = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32)
        of(result, x)
        return result

    check_same(total, torch.randn(20, 300, generator=generator(6)).to(dtype))


# Products.


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


# Keys and values.


HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 20, 16


def states(heads: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(2, heads, tokens, DIM, generator=generator(seed))


def channels() -> tuple[Tensor, Tensor]:
    """Scale and zero point of 4 bit, ``[heads, dim]``."""
    scale = torch.rand(KV_HEADS, DIM, generator=generator(11)) * 0.3 + 0.1
    return scale, torch.randint(4, 12, (KV_HEADS, DIM), generator=generator(12)).float()


def feedback() -> Tensor:
    return (torch.randn(KV_HEADS, DIM, DIM, generator=generator(13)) * 0.1).triu(1).half()


def packed_of(x: Tensor, scale: Tensor, zero: Tensor, fed: Tensor | None) -> PackedStates:
    packed = pack_states_reference(x, 4, scale, zero, fed)
    return PackedStates(packed, 4, scale, zero, torch.float32)


@pytest.mark.parametrize("fed", [False, True])
def test_states_are_packed_rounded_and_decoded(fed: bool) -> None:
    def packed(x: Tensor, scale: Tensor, zero: Tensor, fed: Tensor | None) -> list[Tensor]:
        reference = pack_states_reference(x, 4, scale, zero, fed)
        chosen = torch.empty_like(reference)
        pack_states(x, 4, scale, zero, chosen, fed)
        rounded = [] if fed is None else [round_states(x, 4, scale, zero, fed)]
        decoded = PackedStates(reference, 4, scale, zero, torch.float32).decoded()
        return [reference, chosen, decoded, *rounded]

    check_same(packed, states(KV_HEADS, TOKENS, 1), *channels(), feedback() if fed else None)


@pytest.mark.parametrize("context", [20, 70])
@pytest.mark.parametrize("in_codes", [False, True])
@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.25),
        Scoring(0.25, softcap=5.0),
        Scoring(0.25, softmax_bits=8),
        Scoring(0.25, softmax_bits=8, relative=False),
    ],
)
def test_attention(scoring: Scoring, in_codes: bool, context: int) -> None:
    def attended(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: Tensor, zero: Tensor
    ) -> list[Tensor | None]:
        with torch.no_grad():
            if in_codes:
                key, value = (packed_of(x, scale, zero, None) for x in (key, value))
            args = query, key, value, mask, scoring
            chosen = attend_reference(*args) if query.device.type == "cpu" else attend(*args)
            return [*attend_reference(*args), *attend_in_tiles(*args, keep=True), *chosen]

    hidden = torch.zeros(TOKENS, context).masked_fill_(
        torch.ones(TOKENS, context).triu(1 + context - TOKENS).bool(), torch.finfo().min
    )
    query = states(HEADS, TOKENS, 2)
    key, value = states(KV_HEADS, context, 3), states(KV_HEADS, context, 4)
    check_same(attended, query, key, value, hidden.expand(2, 1, -1, -1), *channels())


def test_attention_has_gradients() -> None:
    def gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        query.requires_grad_()
        attend(query, key, value, None, Scoring(0.25))[0].square().sum().backward()
        return query.grad

    check_same(gradient, states(HEADS, 4, 2), states(KV_HEADS, 4, 3), states(KV_HEADS, 4, 4))
