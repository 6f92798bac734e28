"""What was asked of the run in a directory, so that it can be continued without being repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from quantine.calibrate.segments import Calibration
from quantine.errors import OutputError
from quantine.formats.directory import REPORT, RUN_DIRECTORY, is_finished, read_json
from quantine.plan.plan import Plan
from quantine.run.job import Job

REQUEST: Final = "request"
"""Name under which a run stores its request."""


@dataclass(frozen=True)
class Request:
    """What was asked of a run.

    Attributes:
        name: what the user called the model; results call it so.
        model: where it was.
        plan: what is done to which matrix.
        calibration: which text, and how it is sampled.
    """

    name: str
    model: str
    plan: Plan
    calibration: Calibration

    def as_plain(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return {
            "name": self.name,
            "model": self.model,
            "plan": self.plan.as_dict(),
            "calibration": dataclasses.asdict(self.calibration),
        }


def request_of(job: Job) -> Request:
    """The request of a job, with files by their whole paths, from wherever it is continued."""
    calibration, name = job.calibration, job.source.name
    source = _whole(calibration.source)
    return Request(name, _whole(name), job.plan, replace(calibration, source=source))


def stored_request(out: Path) -> Request:
    """The request of the run in ``out``, unfinished or finished.

    The report of a finished one has of its text only the name.

    Raises:
        OutputError: there is no run.
    """
    path = out / RUN_DIRECTORY / f"{REQUEST}.json"
    if path.is_file():
        value = read_json(path)
        calibration = value["calibration"]
    elif is_finished(out):
        path = out / REPORT
        report = read_json(path)
        value = {**report, "name": report.get("model")}
        calibration = _calibration(report["calibration"])
    elif (out / RUN_DIRECTORY).is_dir():
        again = "quantize with --resume"
        if (out / REPORT).is_file():
            again = f"delete {out / RUN_DIRECTORY}, and repeat the command"
        raise OutputError(f"{out} was stopped before it said what it was asked for: {again}")
    else:
        raise OutputError(f"{out} holds no run: give the directory that quantize was given")
    try:
        plan = Plan.from_dict(value["plan"])
        return Request(value["name"], value["model"], plan, Calibration(**calibration))
    except (KeyError, TypeError) as error:
        raise OutputError(f"{path} does not say what was asked for: quantize again") from error


def _calibration(said: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Calibration` that a report stands for."""
    fields = {
        key: said[key] for key in ("source", "samples", "seed", "bfloat16", "shards") if key in said
    }
    bos = {} if said.get("bos") in (None, "none") else {"bos": said["bos"]}
    return {**fields, **bos, "seqlen": said["seqlen"] or None}


def _whole(name: str) -> str:
    """``name`` as a whole path, if there is such a file."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
