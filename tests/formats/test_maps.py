"""Sensitivity maps on their way into the output directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantine.formats.directory import MAPS, RUN_DIRECTORY, is_finished
from quantine.run import store as store_module
from quantine.run.store import RunStore
from quantine.source.weight_files import SINGLE, weight_files

WEIGHTS = {"x.codes": torch.ones(2, 2, dtype=torch.uint8)}
REPORT: dict[str, Any] = {"identity": {}, "layers": []}


def maps_of(name: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 3), len(name), dtype=torch.float16)}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    made = RunStore(tmp_path / "out")
    made.open({})
    return made


def test_maps_of_all_parts_become_one_file_that_is_no_weight_file(store: RunStore) -> None:
    store.commit("b0", WEIGHTS, [], maps_of("first"))
    store.commit("norm", {"norm": torch.ones(1)}, [])
    store.commit("b1", {"y.codes": WEIGHTS["x.codes"]}, [], maps_of("second"))
    store.commit("stray", {"z": torch.ones(1)}, [], maps_of("stray"))
    store.finish(["b0", "norm", "b1"], {}, REPORT)
    found = load_file(store.out / MAPS)
    assert found.keys() == {"first", "second"}
    assert all(torch.equal(found[name], maps_of(name)[name]) for name in found)
    assert weight_files(store.out) == [store.out / SINGLE]
    assert load_file(store.out / SINGLE).keys() == {"x.codes", "y.codes", "norm"}


def test_no_maps_no_file(store: RunStore) -> None:
    store.commit("b0", WEIGHTS, [], {})
    store.finish(["b0"], {}, REPORT)
    assert not (store.out / MAPS).exists()


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_killed_between_the_files_of_a_part(
    written: int, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store.out.with_name("whole")
    original = Path.replace
    left = written

    def killed(path: Path, target: Path) -> Path:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return original(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        try:
            store.commit("b0", WEIGHTS, [], maps_of("first"))
        except KeyboardInterrupt:
            assert written < 3
    store.close()
    store.open({})
    assert store.is_committed("b0") is (written == 3)
    if written < 3:
        store.commit("b0", WEIGHTS, [], maps_of("first"))
    store.finish(["b0"], {}, REPORT)
    reference = RunStore(whole)
    reference.open({})
    reference.commit("b0", WEIGHTS, [], maps_of("first"))
    reference.finish(["b0"], {}, REPORT)
    for name in (MAPS, SINGLE):
        assert (store.out / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in store.out.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_killed_while_maps_are_moved(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    move, calls = store_module.move_parts, []

    def killed(moves: Any, parts: Path, unfinished: Path, directory: Path) -> None:
        calls.append(parts.name)
        if parts.name == "maps":
            (unfinished / MAPS).write_bytes(b"half")
            raise KeyboardInterrupt
        move(moves, parts, unfinished, directory)

    store.commit("b0", WEIGHTS, [], maps_of("first"))
    with monkeypatch.context() as patched:
        patched.setattr(store_module, "move_parts", killed)
        with pytest.raises(KeyboardInterrupt):
            store.finish(["b0"], {}, REPORT)
    assert calls == ["parts", "maps"]
    assert not is_finished(store.out)
    store.close()
    store.open({})
    store.finish(["b0"], {}, REPORT)
    assert load_file(store.out / MAPS).keys() == {"first"}
    assert sorted(path.name for path in store.out.iterdir()) == sorted(
        [MAPS, SINGLE, "quantine_report.json"]
    )


def test_parts_of_a_run_begun_before_there_were_maps_are_merged_without(store: RunStore) -> None:
    store.commit("b0", WEIGHTS, [], maps_of("first"))
    shutil.rmtree(store.out / RUN_DIRECTORY / "maps")
    store.finish(["b0"], {}, REPORT)
    assert not (store.out / MAPS).exists()
