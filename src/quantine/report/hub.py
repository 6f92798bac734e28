"""Uploading a quantized directory to the hub, with its card and its numbers."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quantine.errors import FormatError, OutputError, PlanError, QuantineError, cut
from quantine.formats.complete import check_complete
from quantine.formats.directory import REPORT, SCORES, copied_files, is_finished, read_json
from quantine.formats.finished import FinishedDirectory
from quantine.report.record import CARD, recorded, write_card
from quantine.report.verdict import checks_of, kept_floors
from quantine.source.locate import locate
from quantine.source.weight_files import INDEX, SINGLE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DESCRIBING: Final = ("config.json", REPORT, CARD)
"""Files beside the weights that every upload has; the card is written if it is not there."""
REPLACED: Final = ("*.safetensors", INDEX)
"""Patterns of files that an earlier upload may have left, and that would be read with this one."""


@dataclass(frozen=True)
class Upload:
    """What is to be uploaded.

    Attributes:
        directory: where the files are.
        files: their names.
        objections: why it should not be, each a sentence; empty if all is well.
        measured: whether the card says how good the model is.
        source: what the card and the report call the float model.
    """

    directory: Path
    files: list[str]
    objections: list[str]
    measured: bool
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum((self.directory / name).stat().st_size for name in self.files)


def prepare_upload(directory: Path, floors: Mapping[str, float]) -> Upload:
    """What of a quantized ``directory`` belongs into an upload; reads its weights once.

    Args:
        floors: as of `quantine.report.verdict.floors_of`, beside those that were kept.

    Raises:
        FormatError: it is unfinished, not quantine's, or damaged.
        CheckpointError: a weight file is missing.
        OutputError: a JSON file is damaged.
    """
    if not is_finished(directory):
        raise FormatError(
            f"{directory} is no finished directory of quantine: finish it with `quantine quantize "
            "--resume`, or give another one"
        )
    if not (directory / CARD).is_file():
        write_card(directory)
    finished = FinishedDirectory(directory)
    found = locate(directory)
    check_complete(finished, found.bare_model(found.config()))
    weights = [file.name for file in finished.files]
    index = [] if weights == [SINGLE] else [INDEX]
    files = [*weights, *index, *DESCRIBING]
    files += [SCORES] if (directory / SCORES).is_file() else []
    files += copied_files(directory)
    scores = recorded(directory)
    objections = _objections(directory, {**kept_floors(directory), **floors})
    report = read_json(directory / REPORT)
    source = report.get("model") if isinstance(report, dict) else None
    if not isinstance(source, str):
        raise OutputError(f"{directory / REPORT} does not say which model it is of: it is damaged")
    return Upload(directory, files, objections, scores is not None, source)


def _objections(directory: Path, floors: Mapping[str, float]) -> list[str]:
    scores = recorded(directory)
    if scores is not None and scores.get("files") != locate(directory).file_digests():
        return ["its numbers are of other files: measure it with `quantine eval OUT --record`"]
    try:
        checks = checks_of(scores or {"texts": {}, "tasks": {}}, floors)
    except PlanError as error:  # there is no number for a floor
        return [str(error)]
    return [
        f"{check.name} is {check.value:.4f}, below its floor of {check.floor:g}"
        for check in checks
        if not check.passed
    ]


def push(upload: Upload, name: str, hub: HfApi, *, public: bool, anyway: bool) -> str:
    """Upload to the repository ``name``, which is made if there is none.

    It is private; a new one with ``public`` becomes public once all files are there. After an
    interruption the same call goes on, as files that are there are not sent again.

    Args:
        upload: of `prepare_upload`.
        name: ``owner/name``.
        hub: the client, which has the user's token.
        public: whether everybody may see it.
        anyway: whether objections do not count.

    Returns:
        The address of the repository.

    Raises:
        PlanError: ``name`` is no name of a repository.
        OutputError: there are objections, the repository holds something else or is public though
            it should not be, or the hub does not take the files.
    """
    if upload.objections and not anyway:
        raise OutputError(
            f"{upload.directory} is not uploaded: {cut(upload.objections[0], 180)} (--anyway "
            "uploads it all the same)"
        )
    if "/" not in name:
        raise PlanError(f"{cut(name)} lacks its owner: give OWNER/{cut(name)}")
    from huggingface_hub.errors import HFValidationError

    try:
        address = str(hub.create_repo(name, private=True, exist_ok=True))
        private = _check_repository(name, hub, public)
        hub.upload_folder(
            repo_id=name,
            folder_path=upload.directory,
            allow_patterns=[glob.escape(file) for file in upload.files],
            delete_patterns=list(REPLACED),
            commit_message="Upload with quantine",
        )
        if public and private:
            hub.update_repo_settings(name, private=False)
    except (QuantineError, MemoryError):
        raise
    except HFValidationError as error:
        raise PlanError(f"{cut(name)} cannot be a name on the hub: {cut(error)}") from error
    except Exception as error:  # the hub's clients have errors of their own
        raise OutputError(
            f"the hub does not take {name} ({cut(error)}): check the connection and the token "
            "(`hf auth login`); the same command goes on where it stopped"
        ) from error
    return address


def _check_repository(name: str, hub: HfApi, public: bool) -> bool:
    """Whether the repository is private, once nothing speaks against writing into it."""
    info = hub.model_info(name)
    there = {file.rfilename for file in info.siblings or []}
    if REPORT not in there and any(file.endswith(".safetensors") for file in there):
        raise OutputError(f"{name} holds a model that is not quantine's: choose another name")
    if not info.private and not public:
        raise OutputError(
            f"{name} is public: upload with --public, or make it private on the hub first"
        )
    return bool(info.private)
