"""An output directory while it is being made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantine.errors import OutputError, ResumeMismatch
from quantine.formats.directory import REPORT, RUN_DIRECTORY, is_finished, read_json, write_json
from quantine.run.store import (
    RunStore,
    check_identity,
    check_output,
    clear_remains,
    stored_identity,
)
from quantine.source.weight_files import SINGLE

IDENTITY = {"plan": "p1", "weights": "w1"}
TENSORS = {
    "x.codes": torch.tensor([[1, 2]], dtype=torch.uint8),
    "x.scale": torch.tensor([[0.5]], dtype=torch.float16),
}
REPORTS = [{"name": "x", "bytes": 4}]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def started(out: Path) -> RunStore:
    store = RunStore(out)
    store.open(IDENTITY)
    return store


def finished(out: Path) -> RunStore:
    store = started(out)
    store.commit("block-0", TENSORS, REPORTS)
    store.finish(["block-0"], {"config.json": b"{}"}, report())
    return store


def report() -> dict[str, Any]:
    return {"identity": IDENTITY, "layers": REPORTS}


def test_committed_parts_come_back(out: Path) -> None:
    store = started(out)
    assert not store.is_committed("block-0")
    store.commit("block-0", TENSORS, REPORTS)
    store.commit("norm", {"norm": torch.ones(2)}, [])
    assert store.is_committed("block-0")
    with pytest.raises(OutputError, match="another process"):
        RunStore(out).open(IDENTITY)
    store.close()  # as a crash does
    again = RunStore(out)
    again.open(IDENTITY)
    assert again.is_committed("block-0")
    assert not again.is_committed("block-1")
    tensors = again.tensors("block-0")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert all(tensors[k].dtype == TENSORS[k].dtype for k in TENSORS)
    assert again.layer_reports(["norm", "block-0"]) == REPORTS


def test_tensors_outlive_their_file(out: Path) -> None:
    store = started(out)
    store.commit("block-0", TENSORS, REPORTS)
    tensors = store.tensors("block-0")
    shutil.rmtree(out)
    assert tensors["x.codes"].tolist() == [[1, 2]]


def test_a_part_without_its_report_is_not_committed(out: Path) -> None:
    store = started(out)
    store.commit("block-0", TENSORS, REPORTS)
    next(out.rglob("block-0.json")).unlink()  # killed between the two renames
    assert not store.is_committed("block-0")


def test_scratch_of_an_earlier_process_is_dropped_and_parts_are_kept(out: Path) -> None:
    store = started(out)
    store.commit("block-0", TENSORS, REPORTS)
    (store.scratch / "junk").mkdir()
    (store.scratch / "junk" / "000000.npy").write_bytes(b"x")
    store.close()
    store.open(IDENTITY)
    assert list(store.scratch.iterdir()) == []
    assert store.is_committed("block-0")


def test_finish_leaves_only_the_final_files(out: Path) -> None:
    finished(out)
    assert sorted(f.name for f in out.iterdir()) == sorted(["config.json", SINGLE, REPORT])
    assert load_file(out / SINGLE)["x.codes"].tolist() == [[1, 2]]
    assert read_json(out / REPORT) == report()
    assert is_finished(out)
    assert stored_identity(out) == IDENTITY


def test_finish_merges_the_parts_it_is_given_only(out: Path) -> None:
    store = started(out)
    store.commit("block-0", TENSORS, REPORTS)
    store.commit("stray", {"stray": torch.ones(1)}, [])
    store.finish(["block-0"], {}, report())
    assert load_file(out / SINGLE).keys() == TENSORS.keys()


class TestRefusals:
    @pytest.mark.parametrize("resume", [False, True])
    def test_new_and_empty_paths_are_fine(self, out: Path, resume: bool) -> None:
        check_output(out, resume)
        out.mkdir()
        check_output(out, resume)
        assert list(out.iterdir()) == []

    @pytest.mark.parametrize("resume", [False, True])
    def test_foreign_directory(self, out: Path, resume: bool) -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        with pytest.raises(OutputError, match="not empty and not an unfinished run"):
            check_output(out, resume)

    @pytest.mark.parametrize("resume", [False, True])
    def test_file(self, out: Path, resume: bool) -> None:
        out.write_text("a file")
        with pytest.raises(OutputError, match="not a directory"):
            check_output(out, resume)

    @pytest.mark.parametrize("resume", [False, True])
    def test_links_also_dangling_ones(self, tmp_path: Path, out: Path, resume: bool) -> None:
        out.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OutputError, match="not a directory"):
            check_output(out, resume)
        (tmp_path / "elsewhere").mkdir()
        with pytest.raises(OutputError, match="not a directory"):
            check_output(out, resume)

    def test_unfinished_run_needs_resume(self, out: Path) -> None:
        started(out)
        with pytest.raises(OutputError, match="unfinished run: continue it with --resume"):
            check_output(out, resume=False)
        check_output(out, resume=True)

    def test_finished_run_is_never_overwritten(self, out: Path) -> None:
        finished(out)
        with pytest.raises(OutputError, match="not an unfinished run"):
            check_output(out, resume=False)
        check_output(out, resume=True)  # answers "finished already"


class TestIdentity:
    def test_nothing_there_matches_anything(self, out: Path) -> None:
        assert stored_identity(out) is None
        check_identity(out, IDENTITY)

    @pytest.mark.parametrize("make", [started, finished])
    def test_the_same_inputs_match(self, out: Path, make: Any) -> None:
        make(out)
        check_identity(out, dict(reversed(IDENTITY.items())))

    @pytest.mark.parametrize("make", [started, finished])
    @pytest.mark.parametrize(
        ("identity", "named"),
        [
            ({**IDENTITY, "plan": "p2"}, "another plan:"),
            ({"plan": "p2", "weights": "w2"}, "another plan, weights:"),
            ({**IDENTITY, "tokenizer": "t"}, "another tokenizer:"),
            ({"plan": "p1"}, "another weights:"),
        ],
    )
    def test_what_differs_is_named(
        self, out: Path, make: Any, identity: dict[str, str], named: str
    ) -> None:
        make(out)
        with pytest.raises(ResumeMismatch, match=named):
            check_identity(out, identity)

    def test_damaged_identity_says_what_to_do(self, out: Path) -> None:
        started(out)
        (out / RUN_DIRECTORY / "identity.json").write_text("{")
        with pytest.raises(OutputError, match=r"is damaged .* delete the directory"):
            check_identity(out, IDENTITY)


@pytest.mark.parametrize("removed", ["identity.json", "parts/block-0.json"])
def test_killed_while_the_working_files_are_removed(
    out: Path, removed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, ignore_errors: bool) -> None:
        (path / removed).unlink()
        raise KeyboardInterrupt

    store = started(out)
    store.commit("block-0", TENSORS, REPORTS)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.finish(["block-0"], {"config.json": b"{}"}, report())
    # The output is whole, and is not taken for one that other inputs may continue.
    assert is_finished(out)
    check_output(out, resume=True)
    check_identity(out, IDENTITY)
    with pytest.raises(ResumeMismatch, match="another plan"):
        check_identity(out, {**IDENTITY, "plan": "p2"})
    clear_remains(out)
    assert sorted(f.name for f in out.iterdir()) == sorted(["config.json", SINGLE, REPORT])


@pytest.mark.parametrize("last", ["config.json", REPORT])
def test_killed_before_the_run_has_ended(
    out: Path, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.replace

    def killed(path: Path, target: Path) -> Path:
        result = original(path, target)
        if target.name == last:
            raise KeyboardInterrupt
        return result

    store = started(out)
    store.commit("block-0", TENSORS, REPORTS)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.finish(["block-0"], {"config.json": b"{}"}, report())
    store.close()
    assert not is_finished(out)
    again = started(out)
    assert again.is_committed("block-0")
    again.finish(["block-0"], {"config.json": b"{}"}, report())
    assert is_finished(out)
    assert sorted(f.name for f in out.iterdir()) == sorted(["config.json", SINGLE, REPORT])


def test_json_is_utf8_and_ends_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"name": "Größe", "n": [1, 2]})
    data = path.read_bytes()
    assert data.endswith(b"}\n")
    assert "Größe".encode() in data
    assert read_json(path) == json.loads(data) == {"name": "Größe", "n": [1, 2]}


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"identity": null}', '{"identity": [1]}'])
def test_a_report_that_says_nothing_of_a_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / REPORT).write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match="says nothing of a run"):
        check_identity(tmp_path, {"weights": "1"})


@pytest.mark.parametrize("text", ["null", "5", '"ab"', '{"weights": 1}'])
def test_an_unfinished_run_without_identity_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / RUN_DIRECTORY / "identity.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match="says nothing of a run"):
        check_identity(tmp_path, {"weights": "1"})
