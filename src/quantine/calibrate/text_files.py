"""Texts in local files: plain text, rows of JSON or parquet, conversations, compressed or not."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from quantine.calibrate.conversations import conversation_text
from quantine.calibrate.token_stream import check_characters
from quantine.errors import CalibrationError, ending

KINDS: Final = (".txt", ".jsonl", ".json", ".parquet")
"""Suffixes of the files that can be read."""
COMPRESSIONS: Final = (".gz", ".zst")
"""Suffixes that may follow one of `KINDS`."""
FIELDS: Final = ("text", "messages", "conversations")
"""Names of the field that is read where none is asked for: the first that the first row has."""
BETWEEN_TEXTS: Final = "\n\n"
"""What is put between two rows. Conversations follow one another as their template ends them."""
CHUNK: Final = 2**20
"""Number of compressed bytes that are given to zstandard at once."""
LARGEST_WINDOW: Final = 2**31
"""Largest distance in bytes over which zstandard may refer back: that of ``zstd --long=31``."""
MARKS: Final = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins with UTF-16's mark, and so comes first
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Encodings, other than UTF-8, by the bytes that files in them begin with."""

Row = tuple[str, Any]
"""Where a row is, such as ``rows.jsonl: line 3``, and its value."""


@dataclass(frozen=True)
class TextFile:
    """A file with a text, as users name it.

    Attributes:
        path: the file.
        field: name of the field of a row that holds the text; ``None`` for one of `FIELDS`.
    """

    path: Path
    field: str | None = None

    @property
    def name(self) -> str:
        """What results call the text: its file without the directory, and the field if given."""
        return self.path.name + ("" if self.field is None else f":{self.field}")


def text_file(source: str) -> TextFile | None:
    """The file that ``source`` names as ``FILE`` or ``FILE:FIELD``; ``None`` if there is none."""
    if _is_file(source):
        return TextFile(Path(source))
    file, _, field = source.rpartition(":")
    return TextFile(Path(file), field) if file and field and _is_file(file) else None


def read_file(file: TextFile, tokenizer: Any = None) -> str:
    """The text in a file.

    A ``.txt`` file is read verbatim. Rows of the other kinds are strings, or objects of which one
    field is read; their texts are joined by `BETWEEN_TEXTS`. All files are UTF-8; a byte order mark
    is left out.

    Args:
        file: the file.
        tokenizer: the model's tokenizer of transformers, whose chat template writes conversations;
            ``None`` refuses them.

    Raises:
        CalibrationError: the file cannot be read or used; the message names the file and, where
            there is one, the line or row, and never quotes what is in it.
    """
    kind, where = _kind(file.path), ending(file.path)
    data = _content(file.path)
    if kind == ".parquet":
        return _joined(_parquet_rows(file, data), tokenizer)
    text = _decoded(data, where)
    if kind == ".txt":
        if file.field is not None:
            raise CalibrationError(f"{where} is plain text without fields: leave out :{file.field}")
        return text
    rows = _lines(text, where) if kind == ".jsonl" else _json(file, text, where)
    return _joined(_fields(file, list(rows)), tokenizer)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # longer than any file's name, or in a directory that may not be entered
        return False


def _kind(path: Path) -> str:
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if Path(name).suffix not in KINDS:
        raise CalibrationError(
            f"{ending(path)} has no suffix that says what is in it: {', '.join(KINDS)} are known, "
            f"each also with {' or '.join(COMPRESSIONS)}; name plain text .txt"
        )
    return Path(name).suffix


def _content(path: Path) -> bytes:
    """The bytes of a file, decompressed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{ending(path)} cannot be read: {error.strerror}") from error
    compression = path.suffix.lower()
    try:
        if compression == ".gz":
            return gzip.decompress(data)
        return _from_zstandard(data, path) if compression == ".zst" else data
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(
            f"{ending(path)} is not a whole {compression} file: copy or download it again"
        ) from error


def _from_zstandard(data: bytes, path: Path) -> bytes:
    """Decompress what may be several frames of zstandard, one after another.

    Raises:
        EOFError: they are damaged or cut off.
    """
    try:
        from zstandard import ZstdDecompressor, ZstdError
    except ImportError as error:
        raise CalibrationError(
            f"{ending(path)} needs zstandard: pip install 'quantine[hub]', or decompress it"
        ) from error
    parts: list[bytes] = []
    frame = None
    for start in range(0, len(data), CHUNK):
        rest = data[start : start + CHUNK]
        while rest:
            if frame is None:
                frame = ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
            try:
                parts.append(frame.decompress(rest))
            except ZstdError as error:
                raise EOFError from error
            rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError
    return b"".join(parts)


def _decoded(data: bytes, where: str) -> str:
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            raise CalibrationError(
                f"{where} is {encoding}, not UTF-8: convert it: iconv -f {encoding} -t UTF-8"
            )
    zero = data.find(b"\0")
    if zero >= 0:
        raise CalibrationError(
            f"{where}: line {_line(data, zero)} holds a NUL byte: the file is no text, or UTF-16, "
            "which can be converted: iconv -f UTF-16 -t UTF-8"
        )
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{where}: line {_line(data, error.start)} is not UTF-8: convert the file, if it is "
            "Latin-1: iconv -f LATIN1 -t UTF-8"
        ) from None


def _line(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


def _json(file: TextFile, text: str, where: str) -> Iterable[Row]:
    """The rows of a ``.json`` file: those of an array, one object or string, or one a line.

    Such a file can hold anything, and so the field of objects has to be named, but for lines.
    """
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return _lines(text, where)
        raise _no_json(where, error) from None
    values = value if isinstance(value, list) else [value]
    if file.field is None and any(isinstance(each, Mapping) for each in values):
        raise CalibrationError(
            f"{where} holds JSON objects: say which field of them holds the text by a colon and "
            f"its name at the end, such as :{FIELDS[0]}"
        )
    return [(f"{where}: row {number}", value) for number, value in enumerate(values, 1)]


def _lines(text: str, where: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n")):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _no_json(where, error, number) from None
            yield f"{where}: line {number + 1}", value


def _no_json(where: str, error: Exception, lines_before: int = 0) -> CalibrationError:
    """What is said of text that is no JSON, or has numbers or nesting that Python refuses."""
    return CalibrationError(
        f"{where}: line {lines_before + getattr(error, 'lineno', 1)} is not JSON: mend or remove "
        "it, or name plain text .txt"
    )


def _fields(file: TextFile, rows: Sequence[Row]) -> Iterator[Row]:
    """The values of the field that is read; rows that are no objects are values themselves."""
    objects = [value for _, value in rows if isinstance(value, Mapping)]
    field = _field(file, objects[0]) if objects else file.field
    for where, value in rows:
        if field is None or (file.field is None and not isinstance(value, Mapping)):
            yield where, value
        elif isinstance(value, Mapping) and field in value:
            yield where, value[field]
        else:
            raise _no_field(where, field)


def _field(file: TextFile, names: Iterable[str]) -> str:
    return file.field or next((name for name in FIELDS if name in names), FIELDS[0])


def _no_field(where: str, field: str) -> CalibrationError:
    return CalibrationError(
        f"{where} has no field {ending(field)!r}: name the field that holds the text as FILE:FIELD"
    )


def _parquet_rows(file: TextFile, data: bytes) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CalibrationError(
            f"{ending(file.path)} needs pyarrow: pip install 'quantine[hub]'"
        ) from error
    try:
        table = ParquetFile(BytesIO(data))
        names = table.schema_arrow.names
        field = _field(file, names)
        values = table.read([field])[field].to_pylist() if field in names else None
    except (ArrowException, OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"{ending(file.path)} is not a whole parquet file of strings in UTF-8: copy or "
            "download it again"
        ) from error
    if values is None:
        raise _no_field(ending(file.path), field)
    for number, value in enumerate(values, 1):
        yield f"{ending(file.path)}: row {number}", value


def _joined(rows: Iterable[Row], tokenizer: Any) -> str:
    """The texts of ``rows``, whose values are strings or conversations, as one."""
    texts, conversations = [], 0
    for where, value in rows:
        if value is None:
            raise CalibrationError(f"{where} holds null instead of a text: leave it out")
        if isinstance(value, list):
            conversations += 1
            value = conversation_text(value, tokenizer, where)
        if not isinstance(value, str):
            raise CalibrationError(
                f"{where} holds neither a string nor a conversation: name the field that does as "
                "FILE:FIELD"
            )
        texts.append(check_characters(value, where))
    return ("" if texts and conversations == len(texts) else BETWEEN_TEXTS).join(texts)
