"""Which part of a matrix a process has."""

from __future__ import annotations

import pytest
import torch

from quantine import PlanError, QuantSpec
from quantine.engines.vllm.share import Process, Share, bounds, interleaved_order, shares
from quantine.engines.vllm.stored import StoredMatrix

SPEC = QuantSpec(bits=4, group_size=16)


def matrix(rows: int, columns: int = 64, spec: QuantSpec | None = SPEC) -> StoredMatrix:
    return StoredMatrix("layers.0.q_proj", "sparse", spec, (rows, columns))


def test_bounds() -> None:
    halves = [bounds(64, 32, Process(rank, 2)) for rank in range(2)]
    assert halves == [(0, 32), (32, 64)]
    # Two heads of keys, four processes: neighbours share one.
    keys = [bounds(64, 32, Process(rank, 4)) for rank in range(4)]
    assert keys == [(0, 32), (0, 32), (32, 64), (32, 64)]
    # A layer that is not cut.
    assert [bounds(64, 64, Process(rank, 4)) for rank in range(4)] == [(0, 64)] * 4


def test_matrices_of_a_fused_layer_are_cut_one_by_one() -> None:
    matrices = [matrix(128), matrix(64), matrix(64)]
    found = shares(matrices, [64, 32, 32], 64, Process(1, 2), (4, 2))
    rows = [(64, 128), (32, 64), (32, 64)]
    assert found == [Share(number, place, (0, 64)) for number, place in enumerate(rows)]


def test_a_matrix_that_is_fused_in_the_files_is_cut_part_by_part() -> None:
    whole = matrix(256)
    assert shares([whole], [128, 64, 64], 64, Process(0, 1), (4, 2)) == [
        Share(0, (0, 256), (0, 64))
    ]
    found = shares([whole], [64, 32, 32], 64, Process(1, 2), (4, 2))
    assert [share.outputs for share in found] == [(64, 128), (160, 192), (224, 256)]
    # Four processes, two heads of keys: each is in two of them.
    found = shares([whole], [32, 32, 32], 64, Process(3, 4), (4, 2))
    assert [share.outputs for share in found] == [(96, 128), (160, 192), (224, 256)]
    # Gate and up in one.
    found = shares([whole], [64, 64], 64, Process(1, 2))
    assert [share.outputs for share in found] == [(64, 128), (192, 256)]


def test_inputs_are_cut() -> None:
    found = shares([matrix(32, 64)], [32], 32, Process(1, 2))
    assert found == [Share(0, (0, 32), (32, 64))]


def test_what_cannot_be_cut_is_refused_with_what_works() -> None:
    with pytest.raises(PlanError, match=r"layers\.0\.q_proj.*groups of 16.* into 1, 2, 4"):
        shares([matrix(32, 64)], [32], 8, Process(1, 8))
    coded = QuantSpec(bits=4, group_size=16, scale_bits=3, zero_bits=3)
    with pytest.raises(PlanError, match=r"tiles of 16.* into 1, 2"):
        shares([matrix(32, spec=coded)], [8], 64, Process(1, 4))
    assert shares([matrix(32, 64, None)], [32], 8, Process(1, 8))  # floats can always be cut


@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (4, 2), (4, 1)])
def test_interleaved_order(heads: int, keys: int) -> None:
    width, labels = 3, []
    for key in range(keys):  # as such files have it
        labels += [f"q{key * heads // keys + query}" for query in range(heads // keys)]
        labels += [f"k{key}", f"v{key}"]
    rows = [(label, column) for label in labels for column in range(width)]
    wanted = [f"q{n}" for n in range(heads)] + [f"{x}{n}" for x in "kv" for n in range(keys)]
    order = interleaved_order(heads, keys, width)
    assert [rows[place] for place in order] == [(n, c) for n in wanted for c in range(width)]
    assert torch.equal(order.sort().values, torch.arange(len(rows)))
