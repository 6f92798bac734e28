"""Uploads, to a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from hub import Hub, Repository, hub_server
from quantine import FormatError, OutputError, PlanError, QuantineError, cli, evaluate
from quantine.report.hub import prepare_upload, push
from quantine.report.record import record
from quantine.report.verdict import keep_floors
from quantine.source.locate import locate
from quantine.source.weight_files import SINGLE

NAME = "ann/tiny"
BELONGS = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "quantine_report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # What the developer's environment says of the real hub does not concern this one.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_server() as server:
        yield server


@pytest.fixture
def out(packed: Callable[[str, str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(packed("llama", "rtn"), tmp_path / "out")


def upload(out: Path, hub: Hub, public: bool = False, anyway: bool = False, **floors: float) -> str:
    api = HfApi(endpoint=hub.url, token="hf_x")
    return push(prepare_upload(out, floors), NAME, api, public=public, anyway=anyway)


def measure(out: Path, model: Path, text: Path) -> None:
    scores = evaluate(str(out), [str(text)], window=32, limit=3, reference=str(model))
    record(out, scores, [], locate(out).file_digests())


def without(out: Path, name: str) -> None:
    """Take a tensor out of the weight file."""
    tensors = load_file(out / SINGLE)
    del tensors[name]
    save_file(tensors, out / SINGLE)


def test_what_belongs_is_uploaded_and_private(out: Path, hub: Hub) -> None:
    for name in (".cache/huggingface/x", "notes.txt", "quantine_report.html", "old.safetensors"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    assert upload(out, hub) == f"{hub.url}/{NAME}"
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.files == {name: (out / name).read_bytes() for name in BELONGS}


def test_what_is_there_is_not_sent_again(out: Path, hub: Hub) -> None:
    upload(out, hub)
    upload(out, hub)
    assert hub.repositories[NAME].commits == 1
    (out / "README.md").write_text("# Tiny\n")
    upload(out, hub)
    assert hub.repositories[NAME].commits == 2
    assert hub.repositories[NAME].files["README.md"] == b"# Tiny\n"


def test_a_public_one_is_private_until_it_is_whole(out: Path, hub: Hub) -> None:
    hub.refuse = 403
    with pytest.raises(
        OutputError, match=r"the hub does not take ann/tiny .*goes on where it stopped"
    ):
        upload(out, hub, public=True)
    assert hub.repositories[NAME].private
    hub.refuse = None
    upload(out, hub, public=True)
    assert not hub.repositories[NAME].private
    with pytest.raises(OutputError, match="ann/tiny is public: upload with --public"):
        upload(out, hub)


def test_weights_of_an_earlier_upload_go_and_other_files_stay(out: Path, hub: Hub) -> None:
    old = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}
    hub.repositories[NAME] = Repository(True, {**old, "quantine_report.json": b"", "LICENSE": b"L"})
    upload(out, hub)
    assert hub.repositories[NAME].files.keys() == BELONGS | {"LICENSE"}


def test_a_model_of_somebody_else_is_not_overwritten(out: Path, hub: Hub) -> None:
    hub.repositories[NAME] = Repository(True, {"model.safetensors": b"dear"})
    with pytest.raises(OutputError, match="holds a model that is not quantine's"):
        upload(out, hub, anyway=True)
    assert hub.repositories[NAME].files == {"model.safetensors": b"dear"}


def test_the_card_has_the_numbers_and_floors_hold(
    out: Path, hub: Hub, tiny: Callable[[str], Path], text_file: Path
) -> None:
    measure(out, tiny("llama"), text_file)
    with pytest.raises(
        OutputError, match=r"recovery on text.txt is .*, below its floor of 2 .--anyw"
    ):
        upload(out, hub, recovery=2.0)
    keep_floors(out, {"recovery": 2.0})  # as `report` does
    with pytest.raises(OutputError, match="below its floor of 2"):
        upload(out, hub)
    assert hub.repositories == {}
    upload(out, hub, recovery=0.01)
    upload(out, hub, anyway=True)
    files = hub.repositories[NAME].files
    assert files.keys() == BELONGS | {"quantine_scores.json"}
    assert "| perplexity on text.txt |" in files["README.md"].decode()

    scores = json.loads((out / "quantine_scores.json").read_text())
    scores["files"]["model.safetensors"] = "another"
    (out / "quantine_scores.json").write_text(json.dumps(scores))
    with pytest.raises(OutputError, match="its numbers are of other files"):
        upload(out, hub, recovery=0.01)


def test_floors_need_numbers(out: Path, hub: Hub) -> None:
    with pytest.raises(OutputError, match="there is no top1 to compare with its floor"):
        upload(out, hub, top1=0.5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / ".quantine").mkdir(), "no finished directory of quantine"),
        (lambda out: (out / "quantine_report.json").unlink(), "no finished directory"),
        (lambda out: (out / "quantine_report.json").write_text("{}"), "not say which model"),
        (lambda out: (out / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda out: (out / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors"),
        (lambda out: without(out, "model.norm.weight"), r"model\.norm\.weight"),
    ],
)
def test_unfinished_and_damaged_directories_are_refused(
    damage: Callable[[Path], None], message: str, out: Path, hub: Hub
) -> None:
    damage(out)
    with pytest.raises(QuantineError, match=message):
        upload(out, hub, anyway=True)
    assert hub.repositories == {}


def test_a_card_that_is_not_there_is_written(out: Path) -> None:
    wanted = (out / "README.md").read_text()
    (out / "README.md").unlink()
    prepare_upload(out, {})
    assert (out / "README.md").read_text() == wanted


def test_names_are_checked(out: Path, hub: Hub) -> None:
    api = HfApi(endpoint=hub.url, token="hf_x")
    for name, message in (("tiny", "lacks its owner"), ("ann/a b", "cannot be a name on the hub")):
        with pytest.raises(PlanError, match=message):
            push(prepare_upload(out, {}), name, api, public=False, anyway=False)


def test_the_command_says_why_nothing_was_uploaded(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["push", str(out), NAME]) == cli.EXIT_REFUSED
    said = capsys.readouterr().err
    assert "note: nothing was measured" in said
    assert "show where the float model lies: " in said
    assert "uploading 7 files, 0." in said
    assert "the hub does not take ann/tiny (Cannot reach" in said
    (out / "quantine_report.json").unlink()
    with pytest.raises(FormatError):
        prepare_upload(out, {})
