"""Standard streams that fail: full, closed, without a reader, or of another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantine import OutputError, cli
from quantine.commands.standard_streams import CheckedStream, checked_streams

Packed = Callable[[str, str], Path]
Tiny = Callable[[str], Path]
PROGRAM = f"{sys.executable} -m quantine.cli"
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def shell(command: str, **environment: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a line for the shell, in which ``Q`` is the program."""
    done = subprocess.run(
        ["bash", "-c", command.replace("Q ", f"{PROGRAM} ", 1)],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@needs_full
@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "inspect OUT", "inspect OUT --layers"]
)
def test_a_full_disk_behind_standard_output_is_one_sentence(arguments: str, packed: Packed) -> None:
    arguments = arguments.replace("OUT", str(packed("llama", "rtn")))
    status, _, said = shell(f"Q {arguments} > /dev/full")
    assert status == 2
    assert said.startswith("quantine: standard output cannot be written: No space left on device")
    assert said.count("\n") == 1


def test_a_closed_standard_output_is_one_sentence() -> None:
    status, _, said = shell("Q --version >&-")
    assert status == 2
    assert said == "quantine: standard output is closed: open it, or send it to a file\n"


@needs_full
def test_what_cannot_be_said_anywhere_still_counts() -> None:
    assert shell("Q nonsense 2> /dev/full") == (2, "", "")
    assert shell("Q --help > /dev/full 2>&1") == (2, "", "")


def test_a_closed_standard_error_is_not_missed(tiny: Tiny, tmp_path: Path) -> None:
    options = "--method rtn --bits 4 --group-size 32 --samples 0"
    out = tmp_path / "out"
    assert shell(f"Q quantize {tiny('llama')} {out} {options} 2>&-") == (0, "", "")
    assert (out / "quantine_report.json").is_file()


def test_work_goes_on_when_the_reader_has_gone(packed: Packed, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = f"set -o pipefail; Q inspect {packed('llama', 'rtn')} --layers --json {path} | true"
    assert shell(command) == (0, "", "")
    assert json.loads(path.read_text())["layers"]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_characters_that_the_terminal_lacks_are_replaced(encoding: str, tmp_path: Path) -> None:
    """Both streams: a message on one, and a line printed on the other."""
    name = "\N{EURO SIGN}\N{PLUS-MINUS SIGN}"
    program = (
        "import sys; from quantine.commands.standard_streams import checked_streams\n"
        f"with checked_streams():\n"
        f"    print({name!r}); print({name!r}, file=sys.stderr); sys.stdout.flush()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0
    expected = {"latin-1": "?\N{PLUS-MINUS SIGN}", "ascii": "??", "utf-8": name}[encoding]
    assert done.stdout.decode(encoding) == f"{expected}\n"
    assert done.stderr


@needs_full
def test_json_that_does_not_fit_is_refused_by_name(
    packed: Packed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(packed("llama", "rtn")), "--json", "/dev/full"]) == 2
    assert "/dev/full cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["a\udcff", "\ud83d"])
@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_a_prompt_that_is_no_text_is_refused(
    prompt: str, chat: list[str], tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(tiny("llama")), prompt, *chat]) == 2
    said = capsys.readouterr().err
    assert ("no chat template" if chat else "half of a surrogate pair") in said


class Failing:
    """A stream that fails as the system would, once for each call."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def fileno(self) -> int:
        raise OSError("no file of the system")


def test_failures_of_streams_are_told_from_others() -> None:
    stream = CheckedStream(Failing(OSError(5, "Input/output error")), "here")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="here cannot be written: Input/output error"):
        stream.write("x")
    with pytest.raises(OutputError, match="here cannot be written: Input/output error"):
        stream.flush()
    gone = CheckedStream(Failing(BrokenPipeError()), "here")  # type: ignore[arg-type]
    assert gone.write("abc") == 3
    gone.flush()


def test_the_streams_of_the_caller_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr, sys.stdout.errors
    with checked_streams():
        assert sys.stdout is not before[0]
        assert sys.stdout.errors == "replace"
    assert (sys.stdout, sys.stderr, sys.stdout.errors) == before
