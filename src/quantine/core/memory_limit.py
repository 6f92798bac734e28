"""How much memory this process may use: that of the machine, of its control groups, of its limits.

In a container the machine's memory says nothing: the kernel ends a process whose control group
exceeds its own limit. Groups are nested, and every one on the way up counts.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

LIMITS: Final = {
    "cgroup2": ("memory.max", "memory.high"),
    "cgroup": ("memory.limit_in_bytes",),
}
"""Files of a control group that hold its limits in bytes, by the file system type of its version.
Above ``memory.high`` the kernel slows a group down instead of ending it."""


def memory_limit(root: Path = Path("/")) -> int:
    """The most bytes of memory that this process may use.

    Args:
        root: directory in which ``proc`` and the control groups are found.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = [machine, *_group_limits(root)]
    return min(limits if own == resource.RLIM_INFINITY else [*limits, own])


MOUNT_FIELDS: Final = 6
"""Fewest fields of a line of mountinfo before its dash."""


class _Mount(NamedTuple):
    """A mounted tree of control groups: its type, the group that is on top, and where it is."""

    kind: str
    top: str
    place: str


def _group_limits(root: Path) -> Iterator[int]:
    """The limits of this process's memory groups and of those around them; none off Linux."""
    paths = _own_groups(root / "proc/self/cgroup")
    for mount in _mounts(root / "proc/self/mountinfo"):
        path = paths.get(mount.kind)
        if path is None:
            continue
        place = root / mount.place.lstrip("/")
        # A container may see its own group as the top one, whatever path it is said to have.
        below = Path(path).relative_to(mount.top) if _is_below(path, mount.top) else Path()
        for group in (place / below, *list((place / below).parents)[: len(below.parts)]):
            for name in LIMITS[mount.kind]:
                yield from _bytes_in(group / name)


def _own_groups(file: Path) -> dict[str, str]:
    """Paths of the groups that limit this process's memory, by file system type of the version."""
    found = {}
    for line in _lines(file):
        parts = line.split(":", 2)
        if len(parts) < 3:
            continue  # none of the kernel's
        _, controllers, path = parts
        if not controllers:
            found["cgroup2"] = path
        elif "memory" in controllers.split(","):
            found["cgroup"] = path
    return found


def _mounts(file: Path) -> Iterator[_Mount]:
    """The trees of control groups that can limit memory; see proc(5) for the fields of a line."""
    for line in _lines(file):
        before, _, after = line.partition(" - ")
        # Other file systems put what they like behind their type, spaces included.
        fields, kind, options = before.split(" "), after.split(" ")[0], after.split(" ")[-1]
        if len(fields) < MOUNT_FIELDS:
            continue
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            yield _Mount(kind, _unescaped(fields[3]), _unescaped(fields[4]))


def _is_below(path: str, top: str) -> bool:
    return ".." not in Path(path).parts and Path(path).is_relative_to(top)


def _bytes_in(file: Path) -> Iterator[int]:
    """The number in ``file``; nothing where there is none, as the word ``max`` is no limit."""
    for line in _lines(file):
        if line.isdigit():
            yield int(line)


def _lines(file: Path) -> list[str]:
    """The lines of a file of the kernel's; none where there is no such file, or it is denied."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    """A path of mountinfo, which writes spaces and backslashes as octal numbers."""
    for code in (" ", "\t", "\n", "\\"):
        path = path.replace(f"\\{ord(code):03o}", code)
    return path
