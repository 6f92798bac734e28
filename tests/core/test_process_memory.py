"""What a process says of its memory, and gives back."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from quantine.core import process_memory
from quantine.core.process_memory import (
    peak_memory,
    resident_memory,
    return_freed_memory,
    reuse_freed_memory,
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_given_back_where_it_is_much() -> None:
    reuse_freed_memory()
    tensors = [torch.ones(2**18) for _ in range(128)]  # 1 MiB each, in the heap
    del tensors[::2]
    before = resident_memory()
    assert before is not None
    assert before <= peak_memory()
    return_freed_memory(2**40)
    assert (resident_memory() or 0) > before - 2**24
    return_freed_memory(2**25)
    assert (resident_memory() or 0) < before - 2**25


def test_where_no_file_tells_only_the_peak_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process_memory, "STATUS", tmp_path / "status")
    assert resident_memory() is None
    assert peak_memory() > 50_000_000
