"""A run that is continued begins where the hidden states of the earlier process are."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import assert_same_run, stop_after

import quantine
from little_memory import little_memory
from quantine import Calibration, Plan
from quantine.calibrate.hidden_states import HiddenStates
from quantine.calibrate.sequential import Sequential
from quantine.formats.directory import RUN_DIRECTORY
from quantine.run.progress import Silent
from quantine.run.store import RunStore
from quantine.source.checkpoint import Checkpoint
from quantine.source.tensor_files import SafetensorsFiles
from stopped_runs import stopped_at
from tiny_models import build, tiny_config

GPTQ = Plan.preset("gptq", bits=3, group_size=32)
PLANS: dict[str, tuple[Plan, bool]] = {
    "weights": (GPTQ, False),
    "spilled": (GPTQ, True),
    "float inputs": (
        Plan.from_dict(
            {"rules": [{"match": "@blocks", "method": "gptq", "bits": 3, "group_size": 32}]}
            | {"float_inputs": True}
        ),
        False,
    ),
    "activations": (Plan.scheme("W4A8", method="rtn"), False),
    "budget": (Plan.budget(3.5), False),
}


class Heard:
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda *_: None

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four blocks."""
    return build(tiny_config("llama", num_hidden_layers=4), tmp_path_factory.mktemp("m") / "model")


@pytest.fixture(scope="module")
def several(text_file: Path) -> Calibration:
    """So many tokens that they are two batches."""
    return Calibration(str(text_file), samples=96, seqlen=32)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks that hidden states pass, in order."""
    advance, numbers = Sequential.advance, []

    def watched(self: Sequential, index: int) -> None:
        numbers.append(index)
        advance(self, index)

    monkeypatch.setattr(Sequential, "advance", watched)
    return numbers


@pytest.mark.parametrize(("plan", "spills"), PLANS.values(), ids=PLANS)
def test_finished_blocks_are_not_computed_again(
    plan: Plan,
    spills: bool,
    model: Path,
    short: Calibration,
    tmp_path: Path,
    passed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: Any = Heard()
    with little_memory(spills):
        whole = quantine.quantize(model, tmp_path / "whole", plan, short).path
        with monkeypatch.context() as patched:
            stop_after(2, patched)
            with pytest.raises(KeyboardInterrupt):
                quantine.quantize(model, tmp_path / "out", plan, short)
        passed.clear()
        again = quantine.quantize(model, tmp_path / "out", plan, short, resume=True, progress=heard)
    assert passed == [2, 3]
    assert not any("hidden states" in note for note in heard.notes)
    assert [block["block"] for block in again.report["run"]["blocks"]] == [0, 1, 2, 3]
    assert_same_run(again.path, whole)


def test_the_token_table_is_not_read_again_where_hidden_states_are_there(
    model: Path, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_at("block-00002"):
        quantine.quantize(model, tmp_path / "out", GPTQ, short)
    read, names = Checkpoint.read, []

    def watched(self: Checkpoint, wanted: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = read(self, wanted)
        names.extend(tensors)
        return tensors

    monkeypatch.setattr(Checkpoint, "read", watched)
    quantine.quantize(model, tmp_path / "out", GPTQ, short, resume=True)
    assert {name for name in names if ".layers." not in name} == {"model.norm.weight"}


@pytest.mark.parametrize("spills", [False, True], ids=["in memory", "spilled"])
def test_killed_between_two_batches(
    spills: bool,
    model: Path,
    several: Calibration,
    tmp_path: Path,
    passed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with little_memory(spills):
        whole = quantine.quantize(model, tmp_path / "whole", GPTQ, several).path
    put = HiddenStates.put

    def killed(self: HiddenStates, index: int, hidden: torch.Tensor, enters: int) -> None:
        if (index, enters) == (1, 2):
            raise KeyboardInterrupt
        put(self, index, hidden, enters)

    with monkeypatch.context() as patched:
        patched.setattr(HiddenStates, "put", killed)
        with little_memory(spills), pytest.raises(KeyboardInterrupt):
            quantine.quantize(model, tmp_path / "out", GPTQ, several)
    passed.clear()
    with little_memory(not spills):  # it may go on with other memory
        again = quantine.quantize(model, tmp_path / "out", GPTQ, several, resume=True)
    assert passed == [1, 2, 3]
    assert_same_run(again.path, whole)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_hidden_states_that_cannot_be_used_are_computed_again(
    damage: str,
    model: Path,
    short: Calibration,
    tmp_path: Path,
    passed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = quantine.quantize(model, tmp_path / "whole", GPTQ, short).path
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            quantine.quantize(model, tmp_path / "out", GPTQ, short)
    states = tmp_path / "out" / RUN_DIRECTORY / "states"
    if damage == "missing":
        shutil.rmtree(states)
    else:
        (path,) = states.iterdir()
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    passed.clear()
    heard: Any = Heard()
    again = quantine.quantize(
        model, tmp_path / "out", GPTQ, short, resume=True, progress=heard
    ).path
    assert passed == [0, 1, 2, 3]
    (said,) = [note for note in heard.notes if "hidden states" in note]
    assert damage in said
    assert "computed again, through the 2 blocks" in said
    assert_same_run(again, whole)


def test_a_run_goes_on_elsewhere(
    model: Path, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantine.quantize(model, tmp_path / "whole", GPTQ, short).path
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            quantine.quantize(model, tmp_path / "out", GPTQ, short)
    (tmp_path / "elsewhere").mkdir()
    there = Path(shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "run"))
    source = Path(shutil.copytree(model, tmp_path / "elsewhere" / model.name))
    quantine.quantize(source, there, GPTQ, short, resume=True)
    name = "model.safetensors"
    assert (there / name).read_bytes() == (whole / name).read_bytes()


def test_hidden_states_are_gone_once_they_are_not_needed(
    model: Path, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: RunStore, *_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantine.quantize(model, tmp_path / "out", GPTQ, short)
    assert not (tmp_path / "out" / RUN_DIRECTORY / "states").exists()
    quantine.quantize(model, tmp_path / "out", GPTQ, short, resume=True)


def edited(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a model's weights after ``change``; the file has the size that it had."""
    tensors = {name: t.clone() for name, t in load_file(model / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(model, tmp_path / "own"))


def last_of(block: int) -> str:
    """The last matrix of a block, as files call it."""
    return f"model.layers.{block}.mlp.down_proj.weight"


def test_only_what_was_used_has_to_be_the_same(
    own: Path, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        with pytest.raises(KeyboardInterrupt):
            quantine.quantize(own, tmp_path / "out", GPTQ, short)
    before = (own / "model.safetensors").read_bytes()
    edited(own, lambda tensors: tensors[last_of(0)].view(-1)[7:8].add_(1))
    with pytest.raises(quantine.ResumeMismatch, match=f"another weights: {last_of(0)} is not"):
        quantine.quantize(own, tmp_path / "out", GPTQ, short, resume=True)
    (own / "model.safetensors").write_bytes(before)
    edited(own, lambda tensors: tensors[last_of(3)].view(-1)[7:8].add_(1))
    again = quantine.quantize(own, tmp_path / "out", GPTQ, short, resume=True)
    whole = quantine.quantize(own, tmp_path / "whole", GPTQ, short)
    assert_same_run(again.path, whole.path)
    assert again.report["identity"]["weights"] == Checkpoint(SafetensorsFiles(own)).digest()


def test_a_block_of_nan_costs_nothing_but_its_own_work(
    own: Path, short: Calibration, tmp_path: Path, passed: list[int]
) -> None:
    whole = quantine.quantize(own, tmp_path / "whole", GPTQ, short)
    before = (own / "model.safetensors").read_bytes()
    edited(own, lambda tensors: tensors[last_of(2)].fill_(float("nan")))
    with pytest.raises(quantine.CheckpointError, match=f"{last_of(2)} in .* holds non-finite"):
        quantine.quantize(own, tmp_path / "out", GPTQ, short)
    passed.clear()
    (own / "model.safetensors").write_bytes(before)  # downloaded again
    again = quantine.quantize(own, tmp_path / "out", GPTQ, short, resume=True)
    assert passed == [2, 3]
    assert_same_run(again.path, whole.path)


def test_a_shard_that_becomes_unreadable_in_the_middle(
    own: Path, short: Calibration, tmp_path: Path, passed: list[int]
) -> None:
    whole = quantine.quantize(own, tmp_path / "whole", GPTQ, short)
    source = own / "model.safetensors"
    before = source.read_bytes()

    class Cutting(Silent):
        def block(self, index: int) -> None:
            if index == 1:  # the next block has been read ahead
                source.write_bytes(before[: len(before) // 2])

    with pytest.raises(quantine.CheckpointError, match="half downloaded"):
        quantine.quantize(own, tmp_path / "out", GPTQ, short, progress=Cutting())
    source.write_bytes(before)
    passed.clear()
    again = quantine.quantize(own, tmp_path / "out", GPTQ, short, resume=True)
    assert passed[0] in (2, 3)
    assert_same_run(again.path, whole.path)


@pytest.mark.parametrize("most", [20_000, 70_000], ids=["hidden states", "moved parts"])
def test_a_file_that_cannot_grow_loses_nothing(
    most: int, model: Path, short: Calibration, tmp_path: Path, passed: list[int]
) -> None:
    whole = quantine.quantize(model, tmp_path / "whole", GPTQ, short)
    passed.clear()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(quantine.OutputError, match=r"File too large.*continue with --resume"):
            quantine.quantize(model, tmp_path / "out", GPTQ, short)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # What is larger than the limit: a batch of hidden states, or the weight file.
    assert passed == ([] if most == 20_000 else [0, 1, 2, 3])
    again = quantine.quantize(model, tmp_path / "out", GPTQ, short, resume=True)
    assert_same_run(again.path, whole.path)
