"""An output directory while it is being made: committed parts, resuming, and the final files.

Unfinished work lives in ``OUT/.quantine``. A part, such as a block, is committed by renaming
complete files into place, the reports last; a run killed at any instant therefore resumes at a part
boundary. The committed files are moved into the final ones, and ``.quantine`` is removed as the
last act.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor

from quantine.errors import OutputError, ResumeMismatch
from quantine.formats.directory import (
    MAPS,
    PAGE,
    REPORT,
    RUN_DIRECTORY,
    SCORES,
    is_finished,
    read_json,
    write_json,
)
from quantine.formats.headers import Entry, read_entries
from quantine.formats.moving import move_parts, moved_entries, planned_move, planned_moves
from quantine.formats.shards import TEMPORARY, write_atomically, write_tensors
from quantine.run.directory_lock import LOCK_FILE, DirectoryLock
from quantine.source.weight_files import INDEX

REMAINS: Final = ".quantine-finished"
"""Name of the run's directory once the output is complete, until it is deleted."""
IDENTITY: Final = "identity.json"
"""Name of the file with the identity of the run, see `quantine.run.job.Job.identity`."""
SHARDS: Final = "shards"
"""Key of the identity for the number of shards of the text, where there are several."""
AT_ONCE: Final = "segments at once"
"""Key of the identity for how many segments go through a block at once, where memory made it fewer
than usual."""
MOVES: Final = "moves"
"""Name under which a run stores where the tensors of its parts go, before it moves them."""
TOKEN_WEIGHTS: Final = "token-weights.safetensors"
"""Name of the file in which a run keeps how much each calibration token counts."""
SHARD_BYTES: Final = 4_000_000_000
"""Largest size of one weight file of the output, in bytes."""

Reports = list[dict[str, Any]]
"""Entries of quantized layers in ``quantine_report.json``, as plain values."""


class RunStore:
    """The files of the unfinished run in one output directory.

    Args:
        out: the output directory.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._run = out / RUN_DIRECTORY
        self._parts = self._run / "parts"
        self._maps = self._run / "maps"
        self._lock = DirectoryLock(out)

    @property
    def scratch(self) -> Path:
        """A directory for temporary files, which the next process deletes."""
        return self._run / "scratch"

    @property
    def states(self) -> Path:
        """The directory of the hidden states that enter the block after those committed."""
        return self._run / "states"

    @property
    def tuned_blocks(self) -> Path:
        """The directory of what blocks are tuned to, while the model is tuned."""
        return self._run / "tuned"

    def drop_states(self) -> None:
        """Delete the hidden states, once the last block is committed."""
        shutil.rmtree(self.states, ignore_errors=True)

    def lock(self) -> None:
        """Lock the output directory for this run, until `close` or the end of the process.

        Raises:
            OutputError: another process is working on it.
        """
        self._lock.take()

    def open(self, identity: Mapping[str, str]) -> None:
        """Start a run, or continue the one on disk, with the lock of this process.

        Scratch files of an earlier process are deleted.

        Args:
            identity: the result of `quantine.run.job.Job.identity`.

        Raises:
            OutputError: another process is working on the run.
        """
        self.lock()
        self._parts.mkdir(parents=True, exist_ok=True)
        self._maps.mkdir(exist_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        write_json(self._run / IDENTITY, dict(identity))

    def is_committed(self, part: str) -> bool:
        """Whether the part of that name is complete on disk."""
        return (self._parts / f"{part}.json").is_file()

    def layer_reports(self, parts: list[str]) -> Reports:
        """The report entries of the layers in committed ``parts``, in order."""
        return [report for part in parts for report in read_json(self._parts / f"{part}.json")]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a committed part, by full name."""
        return {k: v.clone() for k, v in load_file(self._parts / f"{part}.safetensors").items()}

    def maps(self, part: str) -> dict[str, Tensor]:
        """The tensors for pictures of a committed part, by name; none where it has none."""
        path = self._maps / f"{part}.safetensors"
        return {k: v.clone() for k, v in load_file(path).items()} if path.exists() else {}

    def entries(self, parts: list[str]) -> list[Entry]:
        """Names, shapes and places of the tensors of committed ``parts``."""
        moves = self.recall(MOVES)
        if moves is not None:  # some parts may be gone
            return moved_entries(moves["weights"])
        files = [self._parts / f"{part}.safetensors" for part in parts]
        return [entry for file in files for entry in read_entries(file)]

    def nbytes(self, parts: list[str]) -> int:
        """Bytes of the files of committed ``parts``, which the run has not moved yet."""
        return sum((self._parts / f"{part}.safetensors").stat().st_size for part in parts)

    def keep_token_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Store the result of `quantine.calibrate.loss_weights.loss_weights` until the run ends.

        Couplings of all blocks have been stored before.
        """
        write_tensors(self._run / TOKEN_WEIGHTS, weights)
        self.remember(Path(TOKEN_WEIGHTS).stem, {"digest": self._weights_digest()})

    def keep_couplings(self, block: int, couplings: Mapping[str, Tensor]) -> None:
        """Store how outputs of a block's matrices make up for each other until the run ends.

        Args:
            block: number of the block.
            couplings: by name of the layer ``[out, run]``, stored in float16.
        """
        halves = {name: coupling.half() for name, coupling in couplings.items()}
        write_tensors(self._couplings(block), halves)

    def couplings(self, block: int) -> dict[str, Tensor]:
        """What `keep_couplings` stored for a block, in float32; empty if nothing was."""
        path = self._couplings(block)
        return {k: v.float() for k, v in load_file(path).items()} if path.is_file() else {}

    def _couplings(self, block: int) -> Path:
        return self._run / f"couplings-{block:05}.safetensors"

    def token_weights(self) -> dict[str, Tensor] | None:
        """What `keep_token_weights` stored; ``None`` if nothing was, or its bytes have changed."""
        said = self.recall(Path(TOKEN_WEIGHTS).stem)
        path = self._run / TOKEN_WEIGHTS
        if said is None or not path.is_file() or said["digest"] != self._weights_digest():
            return None
        return {name: weights.clone() for name, weights in load_file(path).items()}

    def _weights_digest(self) -> str:
        """The digest of token weights and couplings."""
        digest = hashlib.blake2b(digest_size=16)
        for path in (self._run / TOKEN_WEIGHTS, *sorted(self._run.glob("couplings-*"))):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def remember(self, name: str, value: object) -> None:
        """Store plain values under ``name`` until the run ends; they survive a crash."""
        write_json(self._run / f"{name}.json", value)

    def recall(self, name: str) -> Any:
        """The values stored under ``name`` by `remember`, or ``None``."""
        path = self._run / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def commit(
        self,
        part: str,
        tensors: Mapping[str, Tensor],
        reports: Reports,
        maps: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a part to disk, so that it survives a crash and is not made again.

        Args:
            part: name of the part.
            tensors: its tensors, by full name.
            reports: the report entries of its quantized layers.
            maps: tensors for pictures, by name.
        """
        if maps:
            write_tensors(self._maps / f"{part}.safetensors", maps)
        write_tensors(self._parts / f"{part}.safetensors", tensors)
        write_json(self._parts / f"{part}.json", reports)

    def finish(self, parts: list[str], files: Mapping[str, bytes], report: dict[str, Any]) -> None:
        """Write the final files from the committed parts, and end the run.

        Args:
            parts: names of all parts, in the order in which files hold them.
            files: content of the small files, by name.
            report: the content of ``quantine_report.json``.
        """
        moves = self.recall(MOVES)
        if moves is None:
            maps = [self._maps / f"{p}.safetensors" for p in parts]
            moves = {
                "weights": planned_moves(
                    [self._parts / f"{p}.safetensors" for p in parts], SHARD_BYTES
                ),
                "maps": planned_move([path for path in maps if path.exists()], MAPS),
            }
            # Of the run that this one redoes in part: its weights, and what was said of them.
            said = [self.out / name for name in (INDEX, MAPS, SCORES, PAGE)]
            for old in (*self.out.glob("model*.safetensors"), *said):
                old.unlink(missing_ok=True)
            self.remember(MOVES, moves)
        move_parts(moves["weights"], self._parts, self._run / "shards", self.out)
        move_parts(moves["maps"], self._maps, self._run / "shards", self.out)
        for name, data in files.items():
            (self.out / name).parent.mkdir(exist_ok=True)
            write_atomically(self.out / name, data)
        write_json(self.out / REPORT, report)
        for left in self.out.rglob(f"*{TEMPORARY}"):  # by a process killed while it wrote them
            left.unlink()
        # One rename ends the run; if the deletion is interrupted, `clear_remains` completes it.
        remains = self.out / REMAINS
        self._run.replace(remains)
        self.close()
        clear_remains(self.out)

    def close(self) -> None:
        """Release the lock, so that another process may continue the run."""
        self._lock.release()


def check_output(out: Path, resume: bool) -> None:
    """Check that writing to an output path destroys nothing.

    The answer holds for as long as the caller has the lock of the path, see `RunStore.lock`.

    Args:
        out: the path; it must be new or an empty directory, or with ``resume`` hold a run of
            quantine.
        resume: whether a run there may be continued.

    Raises:
        OutputError: the path holds something else.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} exists and is not a directory: choose another output path")
    if not out.exists() or all(entry.name == LOCK_FILE for entry in out.iterdir()):
        return
    if (out / RUN_DIRECTORY).is_dir():
        if not resume:
            raise OutputError(
                f"{out} holds an unfinished run: continue it with --resume, or delete the directory"
            )
    elif not (resume and (out / REPORT).is_file()):
        raise OutputError(
            f"{out} is not empty and not an unfinished run: choose another output path"
        )


def check_identity(out: Path, identity: Mapping[str, str]) -> None:
    """Check that the run in ``out``, if there is one, was started with the same inputs.

    Args:
        out: the output directory.
        identity: the identity of this run.

    Raises:
        ResumeMismatch: it was not; the message names what differs.
    """
    found = stored_identity(out)
    if found is None:
        return
    keys = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
    if keys:
        raise ResumeMismatch(
            f"the run in {out} was started with another {', '.join(sorted(keys)[:4])}: repeat the "
            "first command exactly, or use another output path"
        )


def stored_identity(out: Path) -> dict[str, str] | None:
    """The identity of the run in ``out``, unfinished or finished; ``None`` if there is none.

    Raises:
        OutputError: what is stored is no identity.
    """
    path = out / RUN_DIRECTORY / IDENTITY
    if path.is_file():
        found = read_json(path)
    elif is_finished(out):
        path = out / REPORT
        report = read_json(path)
        found = report.get("identity") if isinstance(report, dict) else None
    else:
        return None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise OutputError(f"{path} says nothing of a run: use another output path, or delete it")
    return found


def clear_remains(out: Path) -> None:
    """Delete what a run that has ended left behind, which several processes may do at once."""
    shutil.rmtree(out / REMAINS, ignore_errors=True)
