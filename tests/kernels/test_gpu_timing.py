"""The parts of `make gpu` that time products, attention and tokens, in the interpreter.

A GPU that is not there runs what it is given once, and says how long it took.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantine.runtime.graph_decoder import StaticDecoder

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
allowance: Any = importlib.import_module("allowance")
gpu_graphs: Any = importlib.import_module("gpu_graphs")
gpu_products: Any = importlib.import_module("gpu_products")
gpu_attention: Any = importlib.import_module("gpu_attention")
gpu_tokens: Any = importlib.import_module("gpu_tokens")
matrix_programs: Any = importlib.import_module("matrix_programs")
integer_programs: Any = importlib.import_module("integer_programs")


class Imagined:
    """A GPU whose memory gives 1e9 bytes a second; replays take ``spent`` microseconds in turn."""

    device = "cpu"
    bandwidth = 1e9

    def __init__(self, spent: list[float]) -> None:
        self.spent = itertools.cycle(spent)
        self.recorded = 0

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        step()
        self.recorded += 1
        return lambda: None

    def microseconds(self, replay: Callable[[], Any]) -> float:
        replay()
        return next(self.spent)


@pytest.fixture(autouse=True)
def two_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs go through two matrices, and are replayed three times."""
    monkeypatch.setattr(gpu_graphs, "ROTATED", 1)
    monkeypatch.setattr(gpu_graphs, "REPLAYS", 3)


def always() -> Any:
    return allowance.Allowance(float("inf"))


def turns(count: int) -> Any:
    """An allowance that ends after it was asked ``count`` times."""
    return allowance.Allowance(count, itertools.count().__next__)


def test_one_call_takes_its_share_of_the_median_replay() -> None:
    ran: list[str] = []
    calls = [lambda: ran.append("one"), lambda: ran.append("other")]
    assert gpu_graphs.replayed(Imagined([40, 10, 30]), calls) == 15
    assert ran == ["one", "other"]


def test_copies_fill_more_than_a_cache_and_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.arange(25, dtype=torch.float32)
    monkeypatch.setattr(gpu_graphs, "ROTATED", 401)
    found = gpu_graphs.copies(first)
    assert len(found) == 5  # of 100 bytes each
    assert all(torch.equal(each, first) for each in found)
    assert len({each.data_ptr() for each in found}) == 5
    monkeypatch.setattr(gpu_graphs, "MOST_MATRICES", 3)
    assert len(gpu_graphs.copies(first)) == 3
    matrix = matrix_programs.Product(3, 16, "in", 128, True, True, 1).matrix()
    monkeypatch.setattr(gpu_graphs, "ROTATED", 1)
    one, other = gpu_graphs.copies(matrix)
    assert one is matrix
    for mine, copied in zip(one.parts()[0], other.parts()[0], strict=True):
        assert (mine is None) == (copied is None)
        if mine is not None:
            assert torch.equal(mine, copied)
            assert mine.numel() == 0 or mine.data_ptr() != copied.data_ptr()


def test_speeds_are_those_of_the_bytes_and_the_seconds() -> None:
    # 2000 bytes in 4 microseconds are half of 1e9 bytes a second.
    assert gpu_graphs.speeds(Imagined([1]), 4.0, 12.0, 2000) == {
        "microseconds": 4.0,
        "float16_microseconds": 12.0,
        "times_float16": 3.0,
        "gigabytes_per_second": 0.5,
        "share_of_bandwidth": 50.0,
    }


def test_products_are_timed_as_the_runtime_multiplies_and_the_other_way_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_products, "BOTH", 5)
    kind = matrix_programs.Product(4, 128, "in", 128, False, False, 1)
    # A float product takes 6 microseconds for each of two batches, then packed ones 2.
    gpu, time = Imagined([12] * 6 + [4] * 9), always()
    rows = gpu_products.timed_products(gpu, time, [(128, 128)], [kind], (1, 5))
    assert time.failed == []
    assert [(row["by"], row["chosen"]) for row in rows] == [
        ("few rows", True),
        ("tiles", True),
        ("decoded", False),
    ]
    assert gpu.recorded == 5
    moved = sum(part.nbytes for part in kind.matrix().parts()[0] if part is not None)
    for row in rows:
        assert row["times_float16"] == 3.0
        assert row["gigabytes_per_second"] == round(moved / 2000, 1)
        assert row["share_of_bandwidth"] == round(moved / 2e-6 / 1e9 * 100, 1)
    assert rows[0]["kind"].endswith("groups of 128 inputs; 128 inputs, 1 row")
    assert rows[1]["kind"].endswith(" 5 rows")


def test_products_with_outliers_are_those_of_decoded_weights() -> None:
    kind = matrix_programs.Product(3, 16, "in", 128, True, True, 1)
    time = always()
    (row,) = gpu_products.timed_products(Imagined([1]), time, [(100, 128)], [kind], (1,))
    assert row["by"] == "few rows"
    assert time.failed == []


def test_a_wrong_product_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = matrix_programs.Product(4, 128, "in", 128, False, False, 1)
    weight = matrix_programs.qtensor_of(kind).dequantize().repeat(2, 1)

    def right(_: Any, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ weight.T).half()

    def one_output(_: Any, x: torch.Tensor) -> torch.Tensor:
        found = right(_, x)
        found[:, -1] += 0.02 * found.abs().max()
        return found

    def no_number(_: Any, x: torch.Tensor) -> torch.Tensor:
        return right(_, x) * float("nan")

    every = {"right": right, "one output": one_output, "no number": no_number}
    monkeypatch.setattr(gpu_products, "ways", lambda batch: every)
    time = always()
    rows = gpu_products.timed_products(Imagined([1]), time, [(256, 128)], [kind], (4,))
    assert [row["by"] for row in rows] == list(every)  # times are kept
    name = f"256 outputs, {replace(kind, batch=4).name}"
    assert [said.partition(": off by ")[0] for said in time.failed] == [
        f"{name}, one output",
        f"{name}, no number",
    ]


def test_many_rows_meet_a_decoded_matrix_and_tiles_beside_it() -> None:
    found = {batch: list(gpu_products.ways(batch)) for batch in gpu_products.BATCHES}
    both = ["decoded", "tiles"]
    assert found == {1: ["few rows"], 4: ["few rows"], 16: ["tiles"], 256: both, 1024: both}
    kind = matrix_programs.Product(3, 128, "in", 128, False, False, 1)
    weight = matrix_programs.qtensor_of(kind).dequantize()
    x = torch.randn(256, 128, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    expected = x.float() @ weight.T
    off = (gpu_products.ways(256)["decoded"](kind.matrix(), x).float() - expected).abs().max()
    assert float(off) <= 3e-3 * float(expected.abs().max())


def test_what_no_time_is_left_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = gpu_products.kinds(128, 1)
    assert len(set(kinds)) == 32
    timed = []

    def fake(gpu: Any, kind: Any, outputs: int, *_: Any) -> list[Any]:
        timed.append((outputs, kind.bits))
        if len(timed) == 2:
            raise RuntimeError("out of memory")
        return [len(timed)]

    monkeypatch.setattr(gpu_products, "timed_kind", fake)
    monkeypatch.setattr(gpu_products, "TOGETHER", 2)
    shapes, stopped = [(128, 128), (256, 128)], turns(5)
    found = gpu_products.timed_products(Imagined([1]), stopped, shapes, kinds[:3], (1,))
    # Two kinds in all shapes come first; what was found until then is kept.
    assert timed == [(128, 3), (128, 4), (256, 3), (256, 4), (128, 3)]
    assert found == [1, 3, 4, 5]
    assert stopped.failed == [f"128 x 128: {kinds[1].weights}: out of memory"]
    assert stopped.left_out == [f"256 x 128: {kinds[2].weights}"]


def test_integer_products_are_timed() -> None:
    kind = integer_programs.IntegerProduct(4, 128, 128, 1)
    gpu, stopped = Imagined([10] * 6 + [5] * 3), turns(1)
    (row,) = gpu_products.timed_integers(gpu, stopped, [kind], 8, (5, 1))
    assert row["kind"].endswith("128 inputs, 5 tokens")
    assert row["times_float16"] == 2.0
    assert row["outputs"] == 8
    (left,) = stopped.left_out
    assert left.endswith("1 token")
    assert stopped.failed == []


def test_a_wrong_integer_product_is_a_failure() -> None:
    kind = integer_programs.IntegerProduct(4, 128, 128, 1)
    matrix, exact = gpu_products.gridded(kind, 100, "cpu")
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    assert exact(x).shape == (3, gpu_products.CHECKED)

    def another(x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(1.02 * exact(x))

    time = always()
    for reference in (exact, another):
        rows = gpu_products.timed_integer(Imagined([1]), kind, [matrix], reference, 1.0, time)
        assert len(rows) == 1
    (said,) = time.failed
    assert said.startswith(f"{kind.name}: off by 0.0")


def test_attention_is_timed_by_context_and_bits() -> None:
    gpu = Imagined([8] * 3 + [4] * 6)
    rows = gpu_attention.timed_attentions(gpu, always(), (64,), (4, 3))
    assert [(row["context"], row["bits"], row["times_float16"]) for row in rows] == [
        (64, 4, 2.0),
        (64, 3, 2.0),
    ]
    # Keys and values of 8 heads: a token and head has 2 * 128 codes.
    assert [row["gigabytes_per_second"] for row in rows] == [
        round(8 * 64 * 256 * bits / 8 / 2000, 1) for bits in (4, 3)
    ]
    stopped = turns(1)
    gpu_attention.timed_attentions(Imagined([1]), stopped, (64,), (4, 3))
    assert stopped.left_out == ["3 bits, 64 tokens"]


def test_models_are_compared_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in {"PROMPT": 3, "TOKENS": 1, "RUNS": 1}.items():
        monkeypatch.setattr(gpu_tokens, name, few)

    def make(model: Any, room: int) -> StaticDecoder:
        return StaticDecoder(model, room, lambda step: step)

    shape = gpu_tokens.Shape(128, 256, 1, 4, 2, 50)
    stopped = turns(1)
    first, *kinds = gpu_tokens.timed_models("cpu", stopped, shape, make)
    (packed,) = kinds
    assert (first["kind"], first["times_bfloat16"]) == ("bfloat16", 1.0)
    assert packed["kind"] == next(iter(gpu_tokens.KINDS))
    ratio = packed["tokens_per_second"] / first["tokens_per_second"]
    assert packed["times_bfloat16"] == pytest.approx(ratio, abs=0.02)
    assert stopped.left_out == list(gpu_tokens.KINDS)[1:]
