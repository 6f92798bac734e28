"""What every packed layout promises, for whatever a solver may return."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from contextlib import nullcontext as free
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine import Calibration, Plan, PlanError, quantize
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.errors import FormatError
from quantine.families.layers import Layer
from quantine.formats import FORMATS, format_named
from quantine.formats.description import Description
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES
from quantine.formats.inventory import inventory
from quantine.formats.shards import write_tensors
from quantine.formats.stored_config import check_description
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR
from quantine.plan.checks import check_exclusive
from quantine.plan.decision import Decision
from samples import FAITHFUL, FAITHFUL_SPEC, correlated_inputs, observed, quick, random_weight

SOLVERS: tuple[Solver, ...] = (
    RTN(),
    GPTQ(groups="refit"),
    SpQR(threshold=math.inf),
    SpQR(outliers=0.05),
    FAITHFUL,
)
SPECS = (
    *(
        QuantSpec(bits, group_size, sym)
        for bits in (2, 3, 5, 8)
        for group_size in (-1, 8, 20)
        for sym in (False, True)
    ),
    QuantSpec(4, 8, scale_bits=4, stat_group_size=64),
    QuantSpec(2, -1, True, scale_bits=2, stat_group_size=-1),
    QuantSpec(3, 20, scale_bits=3, zero_bits=8, stat_group_size=3),
    QuantSpec(5, 8, zero_bits=16),
    QuantSpec(3, 8, zero_bits=5),
    FAITHFUL_SPEC,
    *(
        QuantSpec(bits, group_size, sym, group_axis="out")
        for bits in (2, 3, 8)
        for group_size in (-1, 5)
        for sym in (False, True)
    ),
    QuantSpec(4, 5, scale_bits=4, stat_group_size=64, group_axis="out"),
    QuantSpec(3, 1, scale_bits=3, zero_bits=8, stat_group_size=3, group_axis="out"),
    QuantSpec(3, 5, zero_bits=16, group_axis="out"),
    *(GRID_TYPES[name].spec for name in ("Q4_0", "Q5_1", "Q3_K", "Q4_K")),
)
SHAPES = ((5, 40), (16, 48), (3, 256))
"""Tried in turn: some layouts hold whole tiles only."""

READ_ONLY = {"spqr-replace"}
"""Layouts that are read but never written: no solver's result has to fit."""
ROUNDS_OUTLIERS = {"spqr"}
"""Layouts that store outliers as float16 differences from what their codes decode to."""
WRITTEN = [name for name in FORMATS if name not in READ_ONLY]
names = pytest.mark.parametrize("name", WRITTEN)


def holds(name: str, spec: QuantSpec, outliers: bool, shape: tuple[int, int]) -> bool:
    """Whether the layout says that it can hold such a result."""
    layout = format_named(name)
    return layout.supports(spec, outliers) and layout.refusal(spec, *shape) is None


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Any spec; often one that special layouts are made for."""
    if draw(st.integers(0, 3)) == 0:
        return FAITHFUL_SPEC
    sym = draw(st.booleans())
    widths = st.one_of(st.just(16), st.integers(2, 8))
    return QuantSpec(
        bits=draw(st.integers(2, 8)),
        group_size=draw(st.integers(1, 9)),
        sym=sym,
        scale_bits=draw(widths),
        zero_bits=0 if sym else draw(st.one_of(st.just(0), widths)),
        stat_group_size=draw(st.sampled_from([-1, 1, 2, 4, 64])),
        group_axis=draw(st.sampled_from(["in", "out"])),
    )


@st.composite
def qtensors(draw: st.DrawFn) -> tuple[QTensor, QuantSpec]:
    """Any result at all: odd shapes, random codes, statistics and outliers, orders."""
    spec, outliers = draw(specs()), draw(st.sampled_from([None, 0.0, 0.02, 0.3, 1.0]))
    lines = draw(st.sampled_from([1, 2, 5, 16, 32]))
    groups = draw(st.integers(1, 4))
    rows, columns = spec.lines(lines, groups * spec.group_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def codes(bits: int, *shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)

    def statistic(bits: int, largest: float) -> Tensor | Statistic:
        if bits == FLOAT16:
            values = torch.rand(lines, groups, generator=generator) * largest
            return values.half().clamp(min=2.0**-24)
        tile = spec.stat_group_length(lines)
        shape = (groups, -(-lines // tile))
        step = torch.rand(shape, generator=generator).half().clamp(min=2.0**-24)
        return Statistic(
            codes(bits, groups, lines),
            Grid(step, torch.randn(shape, generator=generator).half(), bits, tile),
        )

    zero: Tensor | Statistic | None = None
    if spec.zero_bits:
        zero = statistic(spec.zero_bits, 2.0**spec.bits)
    elif not spec.sym:
        zero = codes(spec.bits, lines, groups)
    scale = statistic(spec.scale_bits, 100.0)
    grid = Grid(scale, zero, spec.bits, spec.group_size, spec.group_axis)
    order = torch.randperm(columns, generator=generator) if draw(st.booleans()) else None
    kept = None
    if outliers is not None:
        mask = torch.rand(rows, columns, generator=generator) < outliers
        kept = Csr.where(mask, torch.randn(rows, columns, generator=generator) * 10)
    if groups == 1 and spec != FAITHFUL_SPEC and draw(st.booleans()):
        spec = replace(spec, group_size=-1)
    return QTensor(codes(spec.bits, rows, columns), grid, order, kept), spec


def shape_of(qtensor: QTensor) -> tuple[int, int]:
    return qtensor.codes.shape[0], qtensor.codes.shape[1]


def bits_of(stored: Tensor | Statistic | None) -> list[Tensor]:
    """Everything a scale or zero point is stored as."""
    if stored is None:
        return []
    if isinstance(stored, Tensor):
        return [stored.view(torch.int16) if stored.dtype == torch.float16 else stored]
    return [stored.codes, *bits_of(stored.grid.scale), *bits_of(stored.grid.zero_point)]


def assert_same(left: QTensor, right: QTensor, rounds_outliers: bool = False) -> None:
    pairs = [([left.codes], [right.codes])]
    pairs += [(bits_of(left.grid.scale), bits_of(right.grid.scale))]
    pairs += [(bits_of(left.grid.zero_point), bits_of(right.grid.zero_point))]
    pairs += [(bits_of(left.grid.minimum), bits_of(right.grid.minimum))]
    pairs += [(orders(left), orders(right))]
    if not rounds_outliers:
        assert (left.outliers is None) == (right.outliers is None)
        pairs += [(parts_of(left.outliers), parts_of(right.outliers))]
    for one, other in pairs:
        assert [tensor.dtype for tensor in one] == [tensor.dtype for tensor in other]
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert (left.grid.bits, left.grid.group_size) == (right.grid.bits, right.grid.group_size)
    assert left.grid.axis == right.grid.axis
    if not rounds_outliers:
        assert torch.equal(left.dequantize(), right.dequantize())
        return
    assert [p.tolist() for p in places_of(left)] == [p.tolist() for p in places_of(right)]
    # Half a float16 step of the difference, which an earlier rounding to float32 may shift.
    difference = right.dequantize() - replace(right, outliers=None).dequantize()
    slack = difference.abs() * 2.0**-11 + right.dequantize().abs() * 2.0**-22 + 2.0**-24
    assert bool(((left.dequantize() - right.dequantize()).abs() <= slack).all())


def orders(qtensor: QTensor) -> list[Tensor]:
    return [] if qtensor.in_perm is None else [qtensor.in_perm]


def parts_of(outliers: Csr | None) -> list[Tensor]:
    if outliers is None:
        return []
    return [outliers.row_offsets, outliers.columns, outliers.values.view(torch.int16)]


def places_of(qtensor: QTensor) -> list[Tensor]:
    """Rows and columns of outliers; none and no entries are the same."""
    kept = qtensor.outliers
    return [] if kept is None or not kept.entries else [kept.row_indices(), kept.columns]


@names
@quick
@given(case=qtensors())
def test_unpack_inverts_pack_or_pack_refuses(name: str, case: tuple[QTensor, QuantSpec]) -> None:
    qtensor, spec = case
    layout, shape = format_named(name), shape_of(qtensor)
    if not holds(name, spec, qtensor.outliers is not None, shape):
        with pytest.raises(FormatError):
            layout.pack(qtensor)
        return
    tensors = layout.pack(qtensor)
    assert set(layout.required(spec, *shape)) <= set(tensors) <= set(layout.tensor_names)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same(layout.unpack(tensors, spec, shape[1]), qtensor, name in ROUNDS_OUTLIERS)
    assert_size(name, tensors, qtensor, spec)


def assert_size(name: str, tensors: dict[str, Tensor], qtensor: QTensor, spec: QuantSpec) -> None:
    """Exact without outliers; with them at most 16-bit values, columns, and row offsets."""
    rows, columns = shape_of(qtensor)
    size = sum(tensor.nbytes for tensor in tensors.values())
    fixed = format_named(name).nbytes(spec, rows, columns, qtensor.in_perm is not None)
    if qtensor.outliers is None:
        assert size == fixed
    else:
        most = fixed + 4 * qtensor.outliers.entries + 4 * (rows + 1)
        assert fixed <= size <= 1.01 * most + 8


def times(qtensor: QTensor, exponent: int) -> QTensor:
    """The matrix times ``2**exponent``, as a solver gives it whose weights were that small."""
    kept = qtensor.outliers
    if kept is not None:
        kept = replace(kept, values=kept.values.float() * 2.0**exponent)
    return replace(qtensor, grid=replace(qtensor.grid, exponent=exponent), outliers=kept)


@names
@quick
@given(case=qtensors(), exponent=st.integers(-100, -1))
def test_small_weights_are_held_exactly_or_refused(
    name: str, case: tuple[QTensor, QuantSpec], exponent: int
) -> None:
    qtensor, spec = case
    layout, shape = format_named(name), shape_of(qtensor)
    if not holds(name, spec, qtensor.outliers is not None, shape):
        return
    small = times(qtensor, exponent)
    tensors, reason = {}, ""
    try:
        tensors = layout.pack(small)
    except FormatError as error:
        reason = str(error)
    if not tensors:
        assert reason.endswith("use sparse")
        assert name not in {"dense", "sparse"}
        return
    held = layout.unpack(tensors, spec, shape[1])
    if held.grid.exponent:
        assert torch.equal(held.dequantize(), small.dequantize())
        rows = torch.arange(0, shape[0], 3)
        part = layout.unpack(tensors, spec, shape[1], rows).dequantize()
        assert torch.equal(part, small.dequantize()[rows])
    else:  # folded into what the layout has
        expected = replace(small, outliers=None).dequantize()
        change = replace(held, outliers=None).dequantize() - expected
        assert float(change.norm()) <= 0.01 * float(expected.norm())


@names
@quick
@given(case=qtensors(), picked=st.lists(st.integers(0, 31), max_size=8))
def test_chosen_rows_are_those_of_the_whole(
    name: str, case: tuple[QTensor, QuantSpec], picked: list[int]
) -> None:
    qtensor, spec = case
    layout, shape = format_named(name), shape_of(qtensor)
    if not holds(name, spec, qtensor.outliers is not None, shape):
        return
    rows = torch.tensor([row % shape[0] for row in picked], dtype=torch.int64)
    tensors = layout.pack(qtensor)
    whole = layout.unpack(tensors, spec, shape[1])
    part = layout.unpack(tensors, spec, shape[1], rows)
    assert torch.equal(part.dequantize(), whole.dequantize()[rows])


def tiles(spec: QuantSpec, shape: tuple[int, int]) -> bool:
    return spec.divides(spec.lines(*shape)[1])


def fitting(name: str) -> list[tuple[Solver, QuantSpec, tuple[int, int]]]:
    """Every solver and spec that the layout holds, with the first shape that it holds."""
    return [
        (solver, spec, shape)
        for solver in SOLVERS
        for spec in SPECS
        for shape in [s for s in SHAPES if tiles(spec, s) and holds(name, spec, False, s)][:1]
        if holds(name, spec, solver.outlier_share != 0, shape)
        and (solver.takes_clusters or not spec.blocked)
    ]


CASES = [
    pytest.param(name, *case, id="-".join(map(str, (name, *case))))
    for name in WRITTEN
    for case in fitting(name)
]


def solve(solver: Solver, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    hessian = observed(correlated_inputs(shape[1], 80))
    return solver(random_weight(*shape), hessian, spec)


def test_every_layout_that_is_written_holds_something() -> None:
    assert FORMATS.keys() >= READ_ONLY | ROUNDS_OUTLIERS
    assert {case.values[0] for case in CASES} == set(WRITTEN)


@pytest.mark.parametrize(("name", "solver", "spec", "shape"), CASES)
def test_every_method_fits_and_its_size_is_known_beforehand(
    tmp_path: Path, name: str, solver: Solver, spec: QuantSpec, shape: tuple[int, int]
) -> None:
    solved = solve(solver, spec, shape)
    layout = format_named(name)
    tensors = layout.pack(solved)
    assert_same(layout.unpack(tensors, spec, shape[1]), solved, name in ROUNDS_OUTLIERS)
    assert (solved.in_perm is not None) == solver.stores_order(spec)
    assert_size(name, tensors, solved, spec)
    file = tmp_path / "layer.safetensors"
    write_tensors(file, tensors)
    header = struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert sum(tensor.nbytes for tensor in tensors.values()) == file.stat().st_size - 8 - header


DAMAGED = [
    pytest.param(name, *case, id="-".join(map(str, (name, *case))))
    for name in WRITTEN
    for case in fitting(name)
    if case[1] in {QuantSpec(3, 8), QuantSpec(3, 8, zero_bits=5), FAITHFUL_SPEC} or case[1].blocked
]


@pytest.mark.parametrize(("name", "solver", "spec", "shape"), DAMAGED)
def test_tensors_that_do_not_fit_the_spec_are_refused(
    name: str, solver: Solver, spec: QuantSpec, shape: tuple[int, int]
) -> None:
    layout = format_named(name)
    tensors = layout.pack(solve(solver, spec, shape))
    layout.check(tensors, spec, *shape)
    for key, tensor in tensors.items():
        damaged = [{**tensors, key: tensor.unsqueeze(-1)}]
        if tensor.numel():
            damaged.append({**tensors, key: tensor.to(torch.float64)})
            damaged.append({**tensors, key: tensor[..., :-1]})
        if tensor.numel() and key not in {"codes", "blocks"}:  # which say how many rows there are
            damaged.append({**tensors, key: tensor[:-1]})
        if key != "in_perm":  # its absence means that columns are stored in input order
            damaged.append({k: v for k, v in tensors.items() if k != key})
        for broken in damaged:
            with pytest.raises(FormatError, match=key):
                layout.unpack(broken, spec, shape[1])
            with pytest.raises(FormatError, match=key):
                layout.check(broken, spec, *shape)
    for rows, columns in ((shape[0] + 16, shape[1]), (shape[0], shape[1] + 16), shape[::-1]):
        with pytest.raises(FormatError):
            layout.check(tensors, spec, rows, columns)
    others = (QuantSpec(4, 8), QuantSpec(3, 20), QuantSpec(3, 8, sym=True))
    statistics = []
    if not spec.blocked:  # whose statistics belong together
        statistics = [replace(spec, scale_bits=5), replace(spec, zero_bits=4)]
    for other in (*others, *(one for one in statistics if layout.supports(one, False))):
        with pytest.raises(FormatError):
            layout.unpack(tensors, other, shape[1])
    with pytest.raises(FormatError, match="surprise"):
        layout.unpack({**tensors, "surprise": torch.zeros(1)}, spec, shape[1])


every = pytest.mark.parametrize("name", FORMATS)


def rule_for(name: str) -> dict[str, Any]:
    """A rule of a plan that rounds matrices to a spec that the layout holds."""
    spec = FAITHFUL_SPEC if format_named(name).linears_only else QuantSpec(4, 16)
    spec = GRID_TYPES["Q4_0"].spec if name == "ggml" else spec
    return {"match": "@blocks", "method": "rtn", **spec.as_dict(), "format": name}


def test_layouts_that_are_only_read_go_into_no_plan() -> None:
    assert {name for name, layout in FORMATS.items() if not layout.writable} == READ_ONLY
    for name in READ_ONLY:
        with pytest.raises(PlanError, match=f"format '{name}' cannot hold"):
            Plan.from_dict({"rules": [rule_for(name)]})


@every
def test_what_a_layout_says_of_statistics_and_names(name: str) -> None:
    layout = format_named(name)
    held = [spec for spec in SPECS if layout.supports(spec, False)]
    coded = [spec for spec in held if spec.scale_bits != FLOAT16 or spec.zero_bits not in (0, 16)]
    assert layout.holds_statistics_as_codes == bool(coded)
    for spec in held:
        assert set(layout.required(spec, 32, 320)) <= set(layout.tensor_names)


@every
def test_config_names_every_layer_and_is_read_back(name: str) -> None:
    scheme = Plan.from_dict({"rules": [rule_for(name if name in WRITTEN else "spqr")]}).rules[0]
    assert scheme.scheme is not None
    layers, packed = {"a.0.b": {"scheme": 0, "shape": [32, 64]}}, {"a.0.b": {"codes": (96,)}}
    values = [scheme.scheme.as_dict()]
    described = Description(values, layers, "fast", None, packed, ["a.0.c"])
    layout = format_named(name)
    config = layout.config(described)
    settings = config["quantization_config"]
    assert settings["quant_method"] == layout.quant_method
    if layout.exclusive:  # other programs read it: shapes, and what is not packed
        assert settings["shapes"] == {"a.0.b.codes.shape": 96}
        assert settings["modules_to_not_convert"] == ["a.0.c", "a.0.c.weight"]
        assert "fast" in config.values()
    else:
        check_description(settings)
        assert (settings["schemes"], settings["layers"]) == (values, layers)
        assert settings["arithmetic"] == "fast"


@pytest.mark.parametrize("other", WRITTEN)
@names
def test_exclusive_layouts_refuse_others_and_other_layers(name: str, other: str) -> None:
    def decision(layer: Layer, layout: str) -> Decision:
        return Decision(layer, Plan.from_dict({"rules": [rule_for(layout)]}).rules[0].scheme, "")

    inside, beside = (Layer(f"m.{index}.up", 32, 64, "block", index) for index in range(2))
    pair = [decision(inside, name), decision(beside, other)]
    exclusive = any(format_named(one).exclusive for one in (name, other))
    with pytest.raises(PlanError, match=r"m\.[01]\.up") if exclusive and name != other else free():
        check_exclusive(pair, rounds_activations=False)
    head = [decision(inside, name), decision(Layer("head", 32, 48, "head"), name)]
    refused = format_named(name).linears_only
    with pytest.raises(PlanError, match="head is the head") if refused else free():
        check_exclusive(head, rounds_activations=False)
    alone = [decision(inside, name)]
    with pytest.raises(PlanError, match="rounded activations") if refused else free():
        check_exclusive(alone, rounds_activations=True)


@names
def test_kept_floats_and_biases_in_the_files(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    layout, plan = format_named(name), Plan.from_dict({"rules": [rule_for(name)]})
    nothing = Calibration(samples=0)
    out = quantize(tiny("llama"), tmp_path / "out", plan, nothing).path
    floats = {tensor["dtype"] for tensor in inventory(out)["kept"]}
    asked = layout.float_dtype
    assert floats == ({"F16", "F32"} if asked is None else {{torch.float16: "F16"}[asked]})
    assert {layer["scheme"]["format"] for layer in inventory(out)["layers"]} == {name}
    biased = tiny("qwen2"), tmp_path / "biased", plan, nothing
    if layout.holds_bias:
        assert any(t["name"].endswith(".bias") for t in inventory(quantize(*biased).path)["kept"])
    else:
        with pytest.raises(PlanError, match=r"q_proj has a bias, which"):
            quantize(*biased)


def test_unknown_format_hints_at_a_newer_version() -> None:
    with pytest.raises(FormatError, match=r"'sparse9' \(known: .*newer quantine"):
        format_named("sparse9")


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [("dense", {}), ("sparse", {"scale_bits": 3}), ("sparse", {"scale_bits": 3, "zero_bits": 3})],
)
def test_both_axes_take_the_same_bytes(name: str, options: dict[str, int], bits: int) -> None:
    sizes = {
        axis: format_named(name).nbytes(
            QuantSpec(bits, 64, stat_group_size=16, group_axis=axis, **options), 1536, 576, False
        )
        for axis in ("in", "out")
    }
    assert sizes["out"] == pytest.approx(sizes["in"], rel=0.01)
