"""What is in the machine code and in the assembly of programs, by the lines that they came from."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
"""NVIDIA's tools that come with Triton."""
LOAD = re.compile(r"ld\.global|cp\.async\.c[ag]")
WIDE_LOAD = re.compile(r"ld\.global\S*\.v4\.b32|cp\.async\.cg")
HALF = re.compile(r"H(?:FMA2|ADD2|MUL2)(?!\.F32)")
"""Instructions of the machine on two float16."""
OTHER = re.compile(r"HADD2\.F32|MOV|IMAD\.MOV|NOP")
"""Instructions that compute with neither: float16 into float32, and moves."""


class Place(NamedTuple):
    """The lines of a function."""

    file: str
    lines: range

    @classmethod
    def of(cls, program: Any) -> Place:
        """Where a program of Triton stands."""
        text, first = inspect.getsourcelines(program.fn)
        return cls(inspect.getfile(program.fn), range(first, first + len(text)))


class Counts(NamedTuple):
    """Instructions of a program: all, and in some functions on two float16 and on integers."""

    all: int
    half: int
    integer: int


def resources(cubin: bytes) -> dict[str, int]:
    """What a thread uses: registers, bytes on the stack, bytes of local memory."""
    said = _said("cuobjdump", "-res-usage", cubin=cubin)
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def loads_at(place: Place, ptx: str) -> tuple[int, int]:
    """Loads from memory in the assembly of ``place``: those of 16 bytes, and all."""
    files = dict(re.findall(r'\.file\s+(\d+) "(.*)"', ptx))
    inside, wide, every = False, 0, 0
    for line in ptx.splitlines():
        if found := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            inside = files[found[1]] == place.file and int(found[2]) in place.lines
        elif inside and LOAD.search(line):
            every += 1
            wide += bool(WIDE_LOAD.search(line))
    return wide, every


def counts(places: Sequence[Place], cubin: bytes) -> Counts:
    """Instructions of the machine, and of ``places`` in it; loops count once."""
    every = half = integer = 0
    for file, line, name in _instructions(cubin):
        every += name != "NOP"
        if any(file == place.file and line in place.lines for place in places):
            if HALF.match(name):
                half += 1
            elif not OTHER.match(name):
                integer += 1
    return Counts(every, half, integer)


def _instructions(cubin: bytes) -> Iterator[tuple[str, int, str]]:
    """File, line and name of each instruction."""
    file, number = "", 0
    for line in _said("nvdisasm", "-c", "-g", cubin=cubin).splitlines():
        if found := re.search(r'//## File "(.*?)", line (\d+)', line):
            file, number = found[1], int(found[2])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line):
            yield file, number, found[1]


def _said(tool: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
