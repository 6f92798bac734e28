"""A matrix is solved, adjusted with its block, then packed and reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quantine
from little_memory import little_memory
from quantine import Calibration, Plan
from quantine.formats import format_named
from quantine.run.block import SolvedBlock
from quantine.run.layer import Solved
from quantine.run.prepare import prepare
from quantine.run.quantize import carry_out
from quantine.statistics.losses import relative_loss
from tiny_models import stored_tensors

Tiny = Callable[[str], Path]
PLAN = Plan.preset("gptq", bits=3, group_size=32, arithmetic="exact")


class Halving:
    """Rounds the last matrix of each block coarser than it was solved: a change easy to see."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.layers: list[list[str]] = []

    def __call__(self, block: SolvedBlock) -> Sequence[Solved]:
        hidden = block.sequential.hidden
        now = [block.sequential.run(block.index, hidden[n]) for n in range(len(hidden))]
        self.losses.append(relative_loss(block.float_outputs, now).value)
        self.layers.append([one.layer.name for one in block.solved])
        *others, last = block.solved
        name = last.layer.name
        halved = replace(last.qtensor, codes=last.qtensor.codes // 2 * 2)
        adjusted = last.adjusted(halved, block.weights[name], block.hessians[name])
        return [*others, adjusted]


def test_what_is_adjusted_is_packed_and_reported_and_runs_from_there_on(
    tiny: Tiny, packed: Callable[[str, str], Path], short: Calibration, tmp_path: Path
) -> None:
    plain, halving = packed("llama", "gptq"), Halving()
    job = prepare(tiny("llama"), PLAN, short)
    result = carry_out(job, tmp_path / "out", adjust=halving)
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for names in halving.layers:
        assert [name.rpartition(".")[2] for name in names] == order
    # It saw the float block beside the solved one.
    assert all(0 < loss < 1 for loss in halving.losses)
    before, after = stored_tensors(plain), stored_tensors(result.path)
    first, last = "model.layers.0.self_attn.q_proj.codes", "model.layers.0.mlp.down_proj.codes"
    assert torch.equal(before[first], after[first])
    assert not torch.equal(before[last], after[last])
    # The next block was calibrated on what the adjusted one puts out.
    following = "model.layers.1.self_attn.q_proj.codes"
    assert not torch.equal(before[following], after[following])
    model, _ = quantine.load(result.path)
    module = model.get_submodule("model.layers.0.mlp.down_proj")
    layout = format_named(module.format_name)
    codes = layout.unpack(module.packed_tensors(), module.spec, module.in_features).codes
    entry = next(e for e in result.report["layers"] if e["name"].endswith("0.mlp.down_proj"))
    assert bool((codes % 2 == 0).all())
    assert entry["output_error"] > 0.01
    assert entry["damp"] == 0.01


def coarser_queries(block: SolvedBlock) -> Sequence[Solved]:
    """Changes the first matrix of a block, which all others come after."""
    first, *others = block.solved
    name = first.layer.name
    coarse = replace(first.qtensor, codes=first.qtensor.codes // 2 * 2)
    return [first.adjusted(coarse, block.weights[name], block.hessians[name]), *others]


def test_the_next_block_sees_a_change_of_any_matrix_however_much_is_kept_in_memory(
    tiny: Tiny, packed: Callable[[str, str], Path], short: Calibration, tmp_path: Path
) -> None:
    found = []
    for little in (False, True):  # computations of a block are kept, or started again
        job = prepare(tiny("llama"), PLAN, short)
        out = tmp_path / str(little)
        with little_memory(little):
            carry_out(job, out, adjust=coarser_queries)
        found.append(stored_tensors(out))
    kept, again = found
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    name = "model.layers.1.mlp.down_proj.codes"
    assert not torch.equal(kept[name], stored_tensors(packed("llama", "gptq"))[name])


def test_an_adjustment_that_changes_nothing_leaves_the_same_bytes(
    tiny: Tiny, packed: Callable[[str, str], Path], short: Calibration, tmp_path: Path
) -> None:
    job = prepare(tiny("llama"), PLAN, short)
    out = carry_out(job, tmp_path / "out", adjust=lambda block: block.solved).path
    name = "model.safetensors"
    assert (out / name).read_bytes() == (packed("llama", "gptq") / name).read_bytes()


def test_an_unknown_device_is_refused_before_work(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    for device, said in (("nowhere", "no device 'nowhere'"), ("meta", "holds no values")):
        with pytest.raises(quantine.BackendUnavailable, match=said):
            quantine.quantize(tiny("llama"), tmp_path / "out", PLAN, short, device=device)
    assert not (tmp_path / "out").exists()
