"""The lock of a directory: one owner at a time, whoever makes, finishes or deletes it meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quantine.errors import OutputError
from quantine.run.directory_lock import LOCK_FILE, DirectoryLock

HOLDER = """
import sys
from pathlib import Path
from quantine.run.directory_lock import DirectoryLock

DirectoryLock(Path(sys.argv[1])).take()
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_second_owner_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first, second = DirectoryLock(tmp_path / "out"), DirectoryLock(tmp_path / "out")
    first.take()
    first.take()  # has it already
    with pytest.raises(OutputError, match="another process is working on"):
        second.take()
    first.release()
    second.take()
    second.release()
    second.release()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"taken\n"
        with pytest.raises(OutputError, match="another process"):
            lock.take()
        holder.kill()
        holder.wait()
        assert (tmp_path / LOCK_FILE).exists()
        lock.take()
    lock.release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_taken_on_a_file_that_is_gone_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the owner before may finish and remove its file."""
    import fcntl

    flock, first = fcntl.flock, True

    def slow(file: int, operation: int) -> None:
        nonlocal first
        if first:
            first = False
            (tmp_path / LOCK_FILE).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    lock = DirectoryLock(tmp_path)
    lock.take()
    with pytest.raises(OutputError, match="another process"):
        DirectoryLock(tmp_path).take()
    lock.release()


def test_many_threads_never_hold_it_together(tmp_path: Path) -> None:
    holders, together, taken = 0, 0, 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal holders, together, taken
        for _ in range(200):
            lock = DirectoryLock(tmp_path / "out")
            try:
                lock.take()
            except OutputError:
                continue
            with counting:
                holders, taken = holders + 1, taken + 1
                together = max(together, holders)
            with counting:
                holders -= 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken > 0
    assert together == 1
    assert list((tmp_path / "out").iterdir()) == []
