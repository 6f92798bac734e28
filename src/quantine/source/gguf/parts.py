"""Models that llama.cpp split into several GGUF files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from quantine.errors import CheckpointError, cut
from quantine.source.gguf.header import GGUFFile, read_header

PART: Final = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""Names of the files of a model that llama.cpp split."""


def read_parts(path: Path) -> list[GGUFFile]:
    """The headers of all files of the model that the file at ``path`` is part of, in order.

    Args:
        path: of one of the files.

    Raises:
        CheckpointError: a part is missing, damaged, or of another model.
    """
    found = PART.match(path.name)
    if found is None:
        whole = read_header(path)
        count = whole.metadata.get("split.count", 1)
        if count != 1:
            raise CheckpointError(
                f"{path} is one of {cut(count, 20)} parts of a model, but its name does not say "
                "which: name it as llama.cpp does, NAME-00001-of-00002.gguf"
            )
        return [whole]
    total = int(found["count"])
    names = [f"{found['stem']}-{number:05}-of-{total:05}.gguf" for number in range(1, total + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{path} is one of {total} parts of a model, and {len(missing)} are missing: "
            f"{', '.join(missing[:2])}; download them beside it"
        )
    parts = [read_header(path.parent / name) for name in names]
    for number, part in enumerate(parts):
        said = part.metadata.get("split.count", total), part.metadata.get("split.no", number)
        if said != (total, number):
            raise CheckpointError(
                f"{part.path} calls itself part {cut(said[1], 20)} of {cut(said[0], 20)}, counted "
                "from 0, unlike its name: download it again"
            )
    tensors = [tensor.name for part in parts for tensor in part.tensors]
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if len(set(tensors)) != len(tensors) or len(tensors) != expected:
        raise CheckpointError(
            f"the parts of {path} hold {len(tensors)} tensors, {len(set(tensors))} of them "
            f"different, not {expected}: they are of several models"
        )
    return parts


def first_part(name: str) -> str:
    """Name of the first file of the model that the file ``name`` is part of: its own if alone."""
    found = PART.match(name)
    return name if found is None else f"{found['stem']}-00001-of-{found['count']}.gguf"
