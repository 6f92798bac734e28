"""Where text comes from."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

import quantine.calibrate.text as text_module
from quantine.calibrate.text import HUB_TEXTS, HubPart, read_text
from quantine.errors import CalibrationError


def test_txt_is_read_verbatim(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n Größe \r\n\n tail ".encode())
    assert read_text(str(path), "calibration") == "\n Größe \r\n\n tail "


def test_jsonl_rows_are_joined_with_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n{"text": "two\\n"}\n')
    assert read_text(str(path), "calibration") == "one\n\ntwo\n"


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_only_newlines_end_a_jsonl_row(tmp_path: Path, odd: str) -> None:
    # Python knows more line ends than JSON Lines does; some are legal inside a JSON string.
    path = tmp_path / "a.jsonl"
    legal = odd if ord(odd) > 0x1F else json.dumps(odd)[1:-1]
    path.write_text(f'{{"text": "a{legal}b"}}\r\n{{"text": "c"}}', encoding="utf-8", newline="")
    assert read_text(str(path), "calibration") == f"a{odd}b\n\nc"


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("secret")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(CalibrationError, match=r"a\.txt cannot be read.*Permission denied"):
        read_text(str(tmp_path / "a.txt"), "calibration")


@pytest.mark.parametrize("content", ["", " \n\t\n "])
def test_empty_text_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(CalibrationError, match="is empty"):
        read_text(str(path), "calibration")


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    for source in (str(tmp_path / "missing.txt"), str(tmp_path), "wikitext3"):
        with pytest.raises(CalibrationError, match=r"no text file .*builtin, wikitext2"):
            read_text(source, "calibration")


def test_builtin_parts_are_disjoint() -> None:
    calibration, heldout = read_text("builtin", "calibration"), read_text("builtin", "heldout")
    for topic in topics.values():
        if len(topic.strip()) > 200:  # long enough to be found once only
            assert not (topic.strip() in calibration and topic.strip() in heldout)
    paragraphs = {p for p in heldout.split("\n\n") if len(p) > 200}
    assert paragraphs
    assert not paragraphs & set(calibration.split("\n\n"))
    # About one topic in four is held out.
    assert 0.1 < len(heldout) / (len(heldout) + len(calibration)) < 0.4
    assert read_text("builtin", "calibration") == calibration


@pytest.mark.parametrize("name", HUB_TEXTS)
def test_hub_texts_are_asked_for_the_right_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    text = HUB_TEXTS[name]

    class Stub:
        """Stands in for the library: remembers the call, delivers three rows."""

        @staticmethod
        def load_dataset(data_set: str, configuration: Any, **options: Any) -> list[Any]:
            asked.append((data_set, configuration, options))
            before = [{text.column: "before"}] * text.part(use).first
            return before + [{text.column: row} for row in ("one", "", "three")]

    monkeypatch.setitem(sys.modules, "datasets", Stub)
    uses: list[text_module.Split] = ["calibration", "heldout"]
    for use in uses:
        part = text.part(use)
        assert read_text(name, use) == part.separator.join(["one", "", "three"])
        options = {
            "split": part.split,
            "streaming": part.rows is not None,
            "revision": text.revision,
        }
        assert asked.pop() == (text.data_set, text.configuration, options)


@pytest.mark.parametrize("name", HUB_TEXTS)
def test_no_row_of_a_hub_text_is_calibrated_on_and_held_out(name: str) -> None:
    calibration, heldout = HUB_TEXTS[name].calibration, HUB_TEXTS[name].heldout
    assert calibration.split != heldout.split or (
        calibration.rows is not None and calibration.first + calibration.rows <= heldout.first
    )


def test_the_held_out_parts_are_those_of_the_papers() -> None:
    """`get_ptb_new` and `get_c4_new` of GPTQ's published code, and its `get_wikitext2`."""
    found = {name: HUB_TEXTS[name].heldout for name in ("wikitext2", "ptb", "c4")}
    assert found == {
        "wikitext2": HubPart("test", "\n\n", None),
        "ptb": HubPart("test", " ", None),
        "c4": HubPart("validation", " ", 1100),
    }


def test_a_limited_hub_text_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        @staticmethod
        def load_dataset(*_: Any, **__: Any) -> Any:
            return ({"text": str(number)} for number in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", Stub)
    assert read_text("c4", "calibration").split("\n\n") == [str(n) for n in range(2000)]
    assert read_text("c4", "heldout").split(" ") == [str(n) for n in range(1100)]


def test_hub_errors_give_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        @staticmethod
        def load_dataset(*_: Any, **__: Any) -> Any:
            raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", Stub)
    with pytest.raises(CalibrationError, match=r"no route.*give a local file"):
        read_text("wikitext2", "calibration")


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``name`` be not installed."""
    original = builtins.__import__

    def refuse(module: str, *rest: Any, **options: Any) -> Any:
        if module.split(".")[0] == name:
            raise ImportError(f"No module named {module!r}")
        return original(module, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_missing_libraries_give_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.txt.zst").write_bytes(b"")
    for library, source in (
        ("datasets", "wikitext2"),
        ("pyarrow", str(tmp_path / "a.parquet")),
        ("zstandard", str(tmp_path / "a.txt.zst")),
    ):
        with monkeypatch.context() as patched:
            without(library, patched)
            with pytest.raises(CalibrationError, match=r"pip install 'quantine\[hub\]'"):
                read_text(source, "calibration")


def test_calibration_never_sees_what_the_papers_hold_out() -> None:
    for name in ("wikitext2", "ptb", "ptb-validation", "c4"):
        assert HUB_TEXTS[name].calibration.split == "train" != HUB_TEXTS[name].heldout.split
