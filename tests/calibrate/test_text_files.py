"""Texts in files of every kind, and what is said of those that cannot be used."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import table
from pyarrow.parquet import write_table

from quantine.calibrate.text import read_text, text_name
from quantine.errors import CalibrationError, QuantineError
from tiny_models import byte_tokenizer

TEXTS = ["one", "two\n", "", "  drei \N{GRINNING FACE}"]
JOINED = "\n\n".join(TEXTS)
CHATS: list[Any] = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    [{"role": "user", "content": "Bye"}],
]
TEMPLATE = (
    "<s>{% for m in messages %}"
    "{% if m.role == 'judge' %}{{ raise_exception('no judges in ' + m.content) }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
LONGEST = 300


def chatty(bos: bool = True) -> Any:
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(*values: object) -> bytes:
    return "\n".join(map(json.dumps, values)).encode()


def array(*values: object) -> bytes:
    return json.dumps(values, indent=1, ensure_ascii=False).encode()


def parquet(directory: Path, **columns: list[Any]) -> bytes:
    write_table(table(columns), directory / "made.parquet")
    return (directory / "made.parquet").read_bytes()


def frames(data: bytes) -> bytes:
    """Several frames of zstandard, as parallel programs write them, and a skippable one."""
    parts = [zstandard.compress(data[start : start + 5]) for start in range(0, len(data), 5)]
    return parts[0] + b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab" + b"".join(parts[1:])


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    ".zst": zstandard.compress,
    ".ZST": frames,
}


@pytest.mark.parametrize("compression", COMPRESSED)
def test_every_kind_of_file_holds_the_same_text(compression: str, tmp_path: Path) -> None:
    rows = [{"id": 1, "text": text} for text in TEXTS]
    contents = {
        "a.txt": JOINED.encode(),
        "b.jsonl": lines(*rows) + b"\r\n\n",
        "c.jsonl": lines(*TEXTS),
        "d.json": array(*TEXTS),
        "e.json": lines(*rows),
        "f.json:text": array(*rows),
        "g.parquet": parquet(tmp_path, id=[1, 2, 3, 4], text=TEXTS),
        "h.parquet:body": parquet(tmp_path, text=["no"] * 4, body=TEXTS),
        "i.jsonl:body": lines(*({"text": "no", "body": text} for text in TEXTS)),
    }
    for name, content in contents.items():
        file, colon, field = name.partition(":")
        path = tmp_path / (file + compression)
        path.write_bytes(COMPRESSED[compression](content))
        assert read_text(f"{path}{colon}{field}", "calibration") == JOINED, name


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}"
    for name, content in (("a.txt", "words"), ("b.jsonl", '{"text": "words"}')):
        (tmp_path / name).write_text(mark + content, encoding="utf-8")
        assert read_text(str(tmp_path / name), "calibration") == "words"


def test_a_colon_may_be_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"b.txt": "field"}))
    assert read_text(str(tmp_path / "a.jsonl:b.txt"), "calibration") == "field"
    (tmp_path / "a.jsonl:b.txt").write_text("file")
    assert read_text(str(tmp_path / "a.jsonl:b.txt"), "calibration") == "file"


def test_names_tell_fields_apart(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert text_name(str(tmp_path / "a.jsonl")) == "a.jsonl"
    assert text_name(f"{tmp_path}/a.jsonl:x/y") == "a.jsonl:x/y"
    assert text_name("builtin") == "builtin"


@pytest.mark.parametrize("name", ["messages", "conversations", "dialogue"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_written_by_the_template(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    content = lines(*({name: chat} for chat in CHATS))
    path.write_bytes(content if kind == "jsonl" else parquet(tmp_path, **{name: CHATS}))
    source = f"{path}:{name}" if name == "dialogue" else str(path)
    said = "[user] Hi\n[assistant] Hello\n", "[user] Bye\n"
    # What the tokenizer puts before a text is left to it; a beginning of the template's own stays.
    assert read_text(source, "calibration", chatty()) == "".join(said)
    assert read_text(source, "calibration", chatty(bos=False)) == f"<s>{said[0]}<s>{said[1]}"


def test_bare_conversations_are_rows_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*CHATS))
    assert read_text(str(tmp_path / "a.jsonl"), "heldout", chatty()).endswith("[user] Bye\n")


@pytest.mark.parametrize("tokenizer", [None, byte_tokenizer()])
def test_conversations_need_a_template(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x"}, {"text": CHATS[0]}))
    with pytest.raises(CalibrationError, match=r"a\.jsonl: line 2 .*no chat template.*plain texts"):
        read_text(str(tmp_path / "a.jsonl"), "calibration", tokenizer)


SECRET = "Geheimnis " * 9_000
GOOD = {"text": SECRET}
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "latin-1": ("a.txt", f"{SECRET}\n{SECRET}\xe9".encode("latin-1"), "line 2 is not UTF-8"),
    "latin-1 rows": ("a.jsonl", lines(GOOD) + b'\n\n{"text": "\xe9"}', "line 3 is not UTF-8"),
    "UTF-16": ("a.txt", SECRET.encode("utf-16"), "is UTF-16, not UTF-8: .*iconv"),
    "UTF-32": ("a.jsonl", SECRET.encode("utf-32"), "is UTF-32, not UTF-8: .*iconv"),
    "UTF-16 unmarked": ("a.txt", f"\n{SECRET}".encode("utf-16-le"), "line 2 holds a NUL byte"),
    "NUL": ("a.txt", f"{SECRET}\n\n\0".encode(), "line 3 holds a NUL byte"),
    "encoded surrogate": ("a.txt", SECRET.encode() + b"\xed\xa0\xbd", "line 1 is not UTF-8"),
    "surrogate": ("a.jsonl", lines(GOOD) + b'\n{"text": "\\ud83d"}', r"line 2 .*U\+D83D"),
    "surrogate in an array": ("a.json", b'["a", "\\ude00b"]', r"row 2 .*U\+DE00"),
    "surrogate in a chat": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        r"line 1 .*U\+D83D",
    ),
    "null": ("a.jsonl", lines(GOOD, {"text": None}), "line 2 holds null"),
    "null in an array": ("a.json", array("a", None), "row 2 holds null"),
    "no field": ("a.jsonl", lines({"body": SECRET}), "line 1 has no field 'text'.*FILE:FIELD"),
    "later no field": ("a.jsonl", lines(GOOD, {"body": SECRET}), "line 2 has no field 'text'"),
    "not a string": ("a.jsonl", lines(GOOD, {"text": 3}), "line 2 holds neither a string"),
    "bytes": ("a.jsonl", lines(GOOD, {"text": {"a": 1}}), "line 2 holds neither a string"),
    "a number": ("a.jsonl", b"3", "line 1 holds neither a string"),
    "a list": ("a.jsonl", b'["text"]', "line 1 holds a list that is no conversation"),
    "an empty list": ("a.jsonl", b'{"messages": []}', "line 1 holds a list that is no conv"),
    "another role": (
        "a.jsonl",
        lines({"messages": [{"role": "judge", "content": SECRET}]}),
        "line 1: .*template refuses the conversation",
    ),
    "other messages": (
        "a.jsonl",
        lines({"conversations": [{"from": "human", "value": SECRET}]}),
        "line 1 holds a list that is no conversation.*`role` and `content`",
    ),
    "broken line": ("a.jsonl", lines(GOOD) + b'\n\n{"text": "', "line 3 is not JSON"),
    "broken object": ("a.json", b'{\n "text":\n "a"\n', "line 4 is not JSON"),
    "broken array": ("a.json", b'[\n"a",\n]', "line 3 is not JSON"),
    "broken lines": ("a.json", lines(GOOD, GOOD) + b"\n{", "line 3 is not JSON"),
    "deep": ("a.jsonl", b"[" * 200_000, "line 1 is not JSON"),
    "huge number": ("a.jsonl", b"9" * 5_000, "line 1 is not JSON"),
    "objects without a field": ("a.json", array(GOOD), "holds JSON objects: say which field"),
    "field of plain text": ("a.txt:text", SECRET.encode(), "plain text without fields"),
    "field of strings": ("a.jsonl:text", lines("a"), "line 1 has no field 'text'"),
    "unknown": ("a.md", SECRET.encode(), r"no suffix .*\.txt, \.jsonl, \.json, \.parquet.*\.gz"),
    "none": ("README", SECRET.encode(), r"no suffix that says what is in it"),
    "only compressed": ("a.gz", gzip.compress(b"a"), r"no suffix that says what is in it"),
    "no gzip": ("a.txt.gz", SECRET.encode(), r"not a whole \.gz file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(SECRET.encode())[:-9], r"not a whole \.gz file"),
    "damaged gzip": (
        "a.txt.gz",
        gzip.compress(SECRET.encode())[:20] + b"\xff" * 90,
        r"not a whole \.gz file",
    ),
    "no zstandard": ("a.txt.zst", SECRET.encode(), r"not a whole \.zst file"),
    "cut zstandard": ("a.txt.zst", zstandard.compress(SECRET.encode())[:-3], r"not a whole \.zst"),
    "no parquet": ("a.parquet", b"PAR1 not really", "not a whole parquet file"),
    "no bytes": ("a.parquet", b"", "not a whole parquet file"),
    "empty": ("a.txt", b"", "is empty"),
    "empty rows": ("a.jsonl", b"\n\n", "is empty"),
    "empty array": ("a.json", b"[]", "is empty"),
    "empty file": ("a.json", b"", "is empty"),
    "empty gzip": ("a.txt.gz", gzip.compress(b" \n\t"), "is empty"),
    "only a mark": ("a.txt", b"\xef\xbb\xbf", "is empty"),
}


@pytest.mark.parametrize(("name", "content", "said"), REFUSED.values(), ids=REFUSED)
def test_files_that_cannot_be_used_are_refused_by_name_and_line(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    file = name.partition(":")[0]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CalibrationError, match=said) as caught:
        read_text(str(tmp_path / name), "calibration", chatty())
    message = str(caught.value)
    assert file in message
    assert "Geheimnis" not in message
    assert len(message) < LONGEST


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["one", None]}, "row 2 holds null"),
        ({"text": [1, 2]}, "row 1 holds neither a string"),
        ({"text": [b"\xff"]}, "row 1 holds neither a string"),
        ({"body": ["one"]}, "has no field 'text'.*FILE:FIELD"),
        ({"messages": [[{"role": "user", "content": None}]]}, "row 1 holds a list that is no"),
    ],
)
def test_parquet_rows_that_cannot_be_used_are_named(
    columns: dict[str, list[Any]], said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(tmp_path, **columns))
    with pytest.raises(CalibrationError, match=rf"a\.parquet.*{said}"):
        read_text(str(tmp_path / "a.parquet"), "calibration", chatty())


@pytest.mark.parametrize("end", [10, 60, 200, -20])
def test_a_cut_parquet_file_is_named(end: int, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(tmp_path, text=[SECRET])[:end])
    with pytest.raises(CalibrationError, match=r"a\.parquet is not a whole parquet file"):
        read_text(str(tmp_path / "a.parquet"), "calibration")


def test_names_that_no_file_can_have_are_refused() -> None:
    for source in ("x" * 5_000, "a\0b", "a.txt:", ":text", ""):
        with pytest.raises(CalibrationError, match="no text file") as caught:
            read_text(source, "calibration")
        assert len(str(caught.value)) < LONGEST


class Refusal(str):
    """What was said of a file that is refused."""


def outcome(source: str) -> str:
    """The text of a file, or what is said of it."""
    try:
        return read_text(source, "calibration", chatty())
    except QuantineError as error:
        return Refusal(error)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    base=st.sampled_from(["a.txt", "a.jsonl", "a.json", "a.parquet", "a.txt.gz", "a.jsonl.zst"]),
    place=st.integers(0, 10**6),
    change=st.binary(max_size=6),
    removed=st.integers(0, 6),
)
def test_any_damage_gives_a_text_or_a_refusal(
    base: str, place: int, change: bytes, removed: int, tmp_path: Path
) -> None:
    rows = lines({"text": "one", "messages": CHATS[0]}, {"text": "two"})
    contents = {
        "a.txt": b"one\ntwo",
        "a.jsonl": rows,
        "a.json": array("one", "two"),
        "a.parquet": parquet(tmp_path, text=["one", "two"]),
        "a.txt.gz": gzip.compress(b"one\ntwo"),
        "a.jsonl.zst": zstandard.compress(rows),
    }
    content = contents[base]
    start = place % len(content)
    (tmp_path / base).write_bytes(content[:start] + change + content[start + removed :])
    found = outcome(str(tmp_path / base))
    assert found.encode()
    if isinstance(found, Refusal):
        assert base in found
        assert len(found) < LONGEST
