"""Parts of a matrix hold the same weights as the whole, or are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantine import RTN, QuantSpec
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.engines.linear import PackedPart
from quantine.engines.split import Axis, counts_that_work, inputs_of, outputs_of, refusal
from samples import generator, observed, random_weight

SHAPE = (96, 64)
CODED = {"scale_bits": 3, "zero_bits": 4}
SPECS = {
    "groups of inputs": QuantSpec(bits=3, group_size=16),
    "whole rows": QuantSpec(bits=5, group_size=-1, sym=True),
    "tiles of rows": QuantSpec(bits=4, group_size=32, stat_group_size=16, **CODED),
    "one tile": QuantSpec(bits=2, group_size=32, stat_group_size=-1, **CODED),
    "half zeros": QuantSpec(bits=4, group_size=8, zero_bits=16),
    "groups of outputs": QuantSpec(bits=3, group_size=32, group_axis="out"),
    "whole columns": QuantSpec(bits=8, group_size=-1, group_axis="out"),
    "tiles of columns": QuantSpec(
        bits=4, group_size=32, stat_group_size=16, group_axis="out", **CODED
    ),
    "clusters": QuantSpec(bits=4, group_size=0, cluster_sizes=(16, 8, 8, 32)),
}
WORK = {
    "groups of inputs": ([1, 2, 3, 4, 6, 8, 12, 16], [1, 2, 4]),
    "whole rows": ([1, 2, 3, 4, 6, 8, 12, 16], [1, 2, 4, 8, 16]),
    "tiles of rows": ([1, 2, 3, 6], [1, 2]),
    "one tile": ([1, 2, 3, 4, 6, 8, 12, 16], [1, 2]),
    "half zeros": ([1, 2, 3, 4, 6, 8, 12, 16], [1, 2, 4, 8]),
    "groups of outputs": ([1, 3], [1, 2, 4, 8, 16]),
    "whole columns": ([1, 2, 3, 4, 6, 8, 12, 16], [1, 2, 4, 8, 16]),
    "tiles of columns": ([1, 3], [1, 2, 4]),
    "clusters": ([1, 2, 3, 4, 6, 8, 12, 16], [1, 2]),
}
"""Into how many equal parts outputs and inputs of `SHAPE` can be cut."""
AXES: tuple[Axis, ...] = ("out", "in")


def solved(spec: QuantSpec, outliers: bool) -> QTensor:
    weight = random_weight(*SHAPE)
    found = RTN()(weight, observed(torch.randn(80, SHAPE[1], generator=generator(1))), spec)
    if not outliers:
        return found
    mask = torch.rand(SHAPE, generator=generator(2)) < 0.05
    return replace(found, outliers=Csr.where(mask, weight * 9))


def cut(qtensor: QTensor, axis: Axis, count: int) -> list[QTensor]:
    size = SHAPE[0 if axis == "out" else 1] // count
    of = outputs_of if axis == "out" else inputs_of
    return [of(qtensor, number * size, (number + 1) * size) for number in range(count)]


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_parts_are_the_whole(name: str, outliers: bool) -> None:
    whole = solved(SPECS[name], outliers)
    x = torch.randn(3, SHAPE[1], generator=generator(3))
    for axis, counts in zip(AXES, WORK[name], strict=True):
        for count in counts:
            parts = cut(whole, axis, count)
            values = torch.cat([part.dequantize() for part in parts], 0 if axis == "out" else 1)
            assert torch.equal(values, whole.dequantize()), (axis, count)
            size = SHAPE[1] // count
            for number, part in enumerate(parts):  # and kernels read them
                given = x if axis == "out" else x[:, number * size : (number + 1) * size]
                product = PackedPart(part, "exact")(given)
                torch.testing.assert_close(product, given @ part.dequantize().T)


@pytest.mark.parametrize("name", SPECS)
def test_other_parts_are_refused(name: str) -> None:
    spec = SPECS[name]
    for axis, works in zip(AXES, WORK[name], strict=True):
        assert counts_that_work(spec, SHAPE, axis) == works
        total = SHAPE[0 if axis == "out" else 1]
        for count in (n for n in range(2, 17) if total % n == 0 and n not in works):
            size = total // count
            whys = [refusal(spec, SHAPE, axis, (n * size, (n + 1) * size)) for n in range(count)]
            assert any(whys), (axis, count)


def test_inputs_in_another_order_are_not_cut() -> None:
    spec = SPECS["groups of inputs"]
    assert refusal(spec, SHAPE, "in", (0, 64), ordered=True) is None
    assert "order" in (refusal(spec, SHAPE, "in", (0, 32), ordered=True) or "")
    assert refusal(spec, SHAPE, "out", (0, 32), ordered=True) is None
    assert counts_that_work(spec, SHAPE, "in", ordered=True) == [1]


def test_an_ordered_matrix_is_cut_by_outputs() -> None:
    order = torch.randperm(SHAPE[1], generator=generator(5))
    whole = replace(solved(SPECS["groups of inputs"], True), in_perm=order)
    parts = cut(whole, "out", 4)
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), whole.dequantize())


def test_a_part_keeps_no_memory_of_the_whole() -> None:
    whole = solved(SPECS["groups of inputs"], False)
    for axis in AXES:
        part = cut(whole, axis, 2)[0]
        assert part.codes.untyped_storage().nbytes() == part.codes.nbytes
