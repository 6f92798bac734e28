"""What every packed layout promises, for whatever a solver may return."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats import FORMATS, format_named
from quantine.formats.shards import write_tensors
from quantine.methods import GPTQ, RTN, Solver
from samples import correlated_inputs, observed, quick, random_weight

SOLVERS: tuple[Solver, ...] = (RTN(), GPTQ(groups="refit"), GPTQ(groups="static"))
names = pytest.mark.parametrize("name", FORMATS)


@st.composite
def qtensors(draw: st.DrawFn) -> tuple[QTensor, QuantSpec]:
    """Any result at all: odd shapes, random codes, scales and zeros, with and without an order."""
    bits, sym, ordered = draw(st.integers(2, 8)), draw(st.booleans()), draw(st.booleans())
    rows, groups, length = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    top = 2**bits
    codes = torch.randint(0, top, (rows, groups * length), generator=generator).to(torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) * 100).half().clamp(min=2.0**-24)
    zero = torch.randint(0, top, (rows, groups), generator=generator).to(torch.uint8)
    order = torch.randperm(groups * length, generator=generator)
    grid = Grid(scale, None if sym else zero, bits, length)
    group_size = -1 if groups == 1 and draw(st.booleans()) else length
    return QTensor(codes, grid, order if ordered else None), QuantSpec(bits, group_size, sym)


def assert_same(left: QTensor, right: QTensor) -> None:
    assert torch.equal(left.codes, right.codes)
    assert left.codes.dtype == right.codes.dtype
    assert torch.equal(left.grid.scale.view(torch.int16), right.grid.scale.view(torch.int16))
    for one, other in (
        (left.grid.zero_point, right.grid.zero_point),
        (left.in_perm, right.in_perm),
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert (left.grid.bits, left.grid.group_size) == (right.grid.bits, right.grid.group_size)
    assert torch.equal(left.dequantize(), right.dequantize())


@names
@quick
@given(case=qtensors())
def test_unpack_inverts_pack_bit_for_bit(name: str, case: tuple[QTensor, QuantSpec]) -> None:
    qtensor, spec = case
    layout = format_named(name)
    rows, columns = qtensor.codes.shape
    tensors = layout.pack(qtensor)
    assert layout.supports(spec)
    assert set(tensors) <= set(layout.tensor_names)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same(layout.unpack(tensors, spec, columns), qtensor)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == layout.nbytes(spec, rows, columns, qtensor.in_perm is not None)


@names
@quick
@given(case=qtensors(), picked=st.lists(st.integers(0, 5), max_size=8))
def test_chosen_rows_are_those_of_the_whole(
    name: str, case: tuple[QTensor, QuantSpec], picked: list[int]
) -> None:
    qtensor, spec = case
    layout = format_named(name)
    rows = torch.tensor([row % len(qtensor.codes) for row in picked], dtype=torch.int64)
    part = layout.unpack(layout.pack(qtensor), spec, qtensor.codes.shape[1], rows)
    assert torch.equal(part.dequantize(), qtensor.dequantize()[rows])


@names
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_method_fits_and_its_size_is_known_beforehand(
    tmp_path: Path, name: str, solver: Solver, group_size: int, sym: bool, bits: int
) -> None:
    layout, spec = format_named(name), QuantSpec(bits, group_size, sym)
    weight, hessian = random_weight(5, 40), observed(correlated_inputs(40, 80))
    solved = solver(weight, hessian, spec)
    tensors = layout.pack(solved)
    assert_same(layout.unpack(tensors, spec, 40), solved)
    predicted = layout.nbytes(spec, 5, 40, solver.stores_order)
    assert predicted == sum(tensor.nbytes for tensor in tensors.values())
    file = tmp_path / "layer.safetensors"
    write_tensors(file, tensors)
    header = struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert predicted == file.stat().st_size - 8 - header


@names
@pytest.mark.parametrize("solver", SOLVERS)
def test_tensors_that_do_not_fit_the_spec_are_refused(name: str, solver: Solver) -> None:
    layout, spec = format_named(name), QuantSpec(3, 8)
    solved = solver(random_weight(5, 40), observed(correlated_inputs(40, 80)), spec)
    tensors = layout.pack(solved)
    for key, tensor in tensors.items():
        damaged = [
            {**tensors, key: tensor[:-1]},
            {**tensors, key: tensor.to(torch.float64)},
            {**tensors, key: tensor.unsqueeze(-1)},
        ]
        if key != "in_perm":  # its absence means that columns are stored in input order
            damaged.append({k: v for k, v in tensors.items() if k != key})
        for broken in damaged:
            with pytest.raises(FormatError, match=key):
                layout.unpack(broken, spec, 40)
    for other in (QuantSpec(4, 8), QuantSpec(3, 20), QuantSpec(3, 8, sym=True)):
        with pytest.raises(FormatError):
            layout.unpack(tensors, other, 40)
    with pytest.raises(FormatError, match="surprise"):
        layout.unpack({**tensors, "surprise": torch.zeros(1)}, spec, 40)


def test_unknown_format_hints_at_a_newer_version() -> None:
    with pytest.raises(FormatError, match=r"'sparse9' \(known: .*newer quantine"):
        format_named("sparse9")
