from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from quantine.core.memory_limit import memory_limit

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V2 = "25 1 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
OTHER = (
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n21 1 0:5 / /proc rw - proc p rw\n"
)


def machine(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    written = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **files}
    for name, content in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "files", "limit"),
    [
        pytest.param(
            "0::/a/b\n",
            V2,
            {"sys/fs/cgroup/a/b/memory.max": "1048576\n"},
            2**20,
            id="version 2",
        ),
        pytest.param(
            "0::/a/b\n",
            V2,
            {
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "2097152\n",
            },
            2**21,
            id="version 2, a group around it",
        ),
        pytest.param(
            "0::/a\n",
            V2,
            {"sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/memory.high": "4096\n"},
            4096,
            id="version 2, slowed down",
        ),
        pytest.param(
            "0::/\n", V2, {"sys/fs/cgroup/memory.max": "8192\n"}, 8192, id="version 2, a container"
        ),
        pytest.param(
            "0::/../../a\n",
            V2,
            {"sys/fs/cgroup/memory.max": "8192\n", "sys/fs/a/memory.max": "1\n"},
            8192,
            id="version 2, outside of the namespace",
        ),
        pytest.param("0::/a\n", V2, {"sys/fs/cgroup/a/memory.max": "max\n"}, None, id="no limit"),
        pytest.param(
            "4:memory:/a/b\n2:cpu:/\n0::/\n",
            V1 + OTHER,
            {
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3145728\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            3 * 2**20,
            id="version 1, a group around it",
        ),
        pytest.param(
            "4:memory,hugetlb:/docker/abc\n",
            "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup ro,memory\n",
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": "65536\n"},
            65536,
            id="version 1, the group itself is mounted",
        ),
        pytest.param(
            "0::/a b\n",
            "25 1 0:22 / /sys/my\\040groups rw - cgroup2 cgroup2 rw\n",
            {"sys/my groups/a b/memory.max": "4096\n"},
            4096,
            id="spaces",
        ),
        pytest.param(
            "4:cpu:/a\n",
            OTHER,
            {"sys/fs/cgroup/cpu/a/memory.max": "1\n"},
            None,
            id="no memory group",
        ),
    ],
)
def test_the_smallest_limit_counts(
    tmp_path: Path, cgroup: str, mountinfo: str, files: dict[str, str], limit: int | None
) -> None:
    found = memory_limit(machine(tmp_path, cgroup, mountinfo, files))
    assert found == (memory_limit(tmp_path / "nowhere") if limit is None else limit)


def test_without_control_groups_it_is_the_machine_or_the_limit_of_the_process(
    tmp_path: Path,
) -> None:
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    expected = MACHINE if own == resource.RLIM_INFINITY else min(MACHINE, own)
    assert memory_limit(tmp_path) == expected


def test_this_machine_has_a_limit() -> None:
    assert 0 < memory_limit() <= MACHINE


@pytest.mark.parametrize(
    "line",
    [
        "9 8 0:1 / /Docker/host rw - 9p drvfs rw,path=C:\\Program Files\\Docker\\x,uid=0\n",
        "9 8 0:1 / /mnt rw - tmpfs  rw\n",
        "9 8 -\n",
        "nothing\n",
    ],
)
def test_lines_of_other_file_systems_are_passed_over(tmp_path: Path, line: str) -> None:
    files = {"sys/fs/cgroup/a/memory.max": "1048576\n"}
    root = machine(tmp_path, "no colon\n0::/a\n", line + V2 + line, files)
    assert memory_limit(root) == 2**20
