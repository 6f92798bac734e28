"""The verb `push`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantine.commands.arguments import add_verb, comma_list
from quantine.errors import ending

if TYPE_CHECKING:
    from quantine.report.hub import Upload


def add(verbs: Any) -> None:
    """Add the verb and its options to the subparsers ``verbs``."""
    parser = add_verb(
        verbs,
        "push",
        _run,
        "Upload a quantized directory to the Hugging Face hub, with its card and its numbers.",
        "  quantine push out ann/Llama-3.2-1B-4bit\n"
        "  quantine push out ann/Llama-3.2-1B-4bit --public --floor recovery=0.98",
    )
    parser.add_argument("directory", metavar="OUT", type=Path, help="a quantized directory")
    parser.add_argument(
        "name", metavar="USER/NAME", help="of the repository; made if there is none"
    )
    parser.add_argument(
        "--public", action="store_true", help="everybody may see it; otherwise it is private"
    )
    parser.add_argument(
        "--floor",
        type=comma_list,
        default=[],
        metavar="NAME=X,...",
        help="refuse a directory that does not reach these, as of `report`, whose last floors hold "
        "too",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="upload also what does not reach its floors"
    )


def _run(arguments: argparse.Namespace) -> None:
    from huggingface_hub import HfApi

    from quantine.report.hub import prepare_upload, push
    from quantine.report.verdict import floors_of

    upload = prepare_upload(arguments.directory, floors_of(arguments.floor))
    for note in [*(upload.objections if arguments.anyway else ()), *_notes(upload)]:
        print(f"note: {note}", file=sys.stderr)
    size = f"{len(upload.files)} files, {upload.nbytes / 1e6:.1f} MB"
    print(f"uploading {size}", file=sys.stderr, flush=True)
    address = push(
        upload, arguments.name, HfApi(), public=arguments.public, anyway=arguments.anyway
    )
    print(f"uploaded: {address} ({'public' if arguments.public else 'private'})")


def _notes(upload: Upload) -> Iterator[str]:
    """What the user may not know, and those who see the upload will."""
    if not upload.measured:
        yield (
            "nothing was measured, so the card does not say how good the model is: `quantine eval "
            "OUT --reference MODEL --record`"
        )
    if Path(upload.source).is_absolute():
        yield f"the card and the report show where the float model lies: {ending(upload.source)}"
