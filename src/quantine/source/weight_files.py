"""Which files of a directory hold a model's weights: those that transformers would load."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Final

from quantine.errors import CheckpointError, cut

SINGLE: Final = "model.safetensors"
"""The weight file of a model that has only one."""
INDEX: Final = "model.safetensors.index.json"
"""The file that says which of several weight files holds which tensor."""
LONGEST_NAME: Final = 255
"""Most characters of the name of a file; where it is longer the system has an error of its own."""
ADAPTER: Final = "adapter_config.json"
"""The file that makes transformers change a model's weights by those of an adapter."""
DISTRIBUTED: Final = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names of the files of a distributed checkpoint, which transformers prefers to all others."""


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of ``directory`` that transformers loads.

    They are those that ``transformers_weights`` in ``config.json`` names, else the single file,
    else those of the index. So an index beside a single file is out of date, and is not read.

    Raises:
        CheckpointError: there are none, the index names files that do not exist, or transformers
            would load files of another kind.
    """
    if any(DISTRIBUTED.fullmatch(path.name) for path in directory.glob("shard-*")):
        raise CheckpointError(
            f"{directory} holds a distributed checkpoint (shard-*.safetensors): load it with "
            "transformers and save it again"
        )
    named = _named(directory)
    if named is not None:
        path = Path(os.path.abspath(directory / named))
        if len(named) > LONGEST_NAME or not path.is_file() or not _is_inside(named, directory):
            raise CheckpointError(
                f"{directory / 'config.json'} names weights in {named[:60]}, which is not there"
            )
        return _of_index(path, directory) if named.endswith(".json") else [path]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        return _of_index(directory / INDEX, directory)
    pickles = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
    if pickles:
        raise CheckpointError(
            f"{directory} holds only pickled weights ({pickles[0].name}), which can run code when "
            "opened and are never read: convert them to safetensors first"
        )
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def float_files(directory: Path) -> list[Path]:
    """The files of `weight_files`, if they are all that decides a model's float weights.

    Raises:
        CheckpointError: as `weight_files`; or there is an adapter that changes the weights.
    """
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{directory} holds an adapter ({ADAPTER}) beside the model: merge it into the weights "
            "and save these, or remove it"
        )
    return weight_files(directory)


def _of_index(index: Path, directory: Path) -> list[Path]:
    """The files in ``directory`` that an index names."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(found["weight_map"].values()))
        outside = [name for name in names if not _is_inside(name, directory)]
        files = [directory / name for name in names if name not in outside]
        missing = [file.name for file in files if not file.is_file()]
        described = isinstance(found["metadata"], dict)  # without it transformers loads nothing
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: download it again") from error
    if not described:
        raise CheckpointError(f"{index} is damaged: its metadata is no table; download it again")
    if outside:
        raise CheckpointError(
            f"{index} names weights in {outside[0][:60]}, which is not in its directory: download "
            "it again"
        )
    if missing:
        raise CheckpointError(
            f"{directory} is incomplete: {index.name} names {len(files)} files, but "
            f"{cut(', '.join(missing))} are missing; download the model again"
        )
    return files


def _is_inside(name: str, directory: Path) -> bool:
    """Whether ``name`` may be that of a file in ``directory``, or in a directory of it."""
    return Path(os.path.abspath(directory / name)).is_relative_to(os.path.abspath(directory))


def _named(directory: Path) -> str | None:
    """The weight file or index that ``config.json`` names, ``None`` where it names none."""
    config = read_config(directory)
    named = config.get("transformers_weights")
    if named is None:
        return None
    if isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json")):
        return named
    if isinstance(named, str) and config.get("quantization_config"):
        return None  # formats.description.LOCK, which keeps transformers from loading it alone
    raise CheckpointError(
        f"{directory / 'config.json'} names weights in {str(named)[:60]!r}, which is neither a "
        "safetensors file nor an index of some: remove transformers_weights"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``config.json`` as plain values; empty where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {cut(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no table")
    return found
