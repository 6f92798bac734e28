"""A model on this machine, whatever kind of files hold it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError

from quantine.errors import CheckpointError, FamilyError, cut, is_out_of_memory, shown
from quantine.source.gguf.config import gguf_config
from quantine.source.gguf.header import GGUFFile
from quantine.source.gguf.parts import read_parts
from quantine.source.gguf.tokenizer import as_file_says
from quantine.source.names import listed, not_understood
from quantine.source.settings import attention_of, check_blocks, check_settings
from quantine.source.tensor_files import SafetensorsFiles, TensorFiles
from quantine.source.weight_files import float_files, read_config, weight_files

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

UNREADABLE: Final = (OSError, ValueError, RuntimeError, LookupError, SafetensorError)
"""Errors in which transformers ends when weights are damaged, or lie in other shapes than the
model's."""
GENERATION: Final = "generation_config.json"
"""The file with a model's settings for generation."""
BAD_VALUES: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,  # of a package with the attention function that the file names
    LookupError,
    TypeError,
)
"""Errors in which a value of another kind in ``config.json`` ends, beside ``ValueError``, wherever
an architecture first uses it."""


@dataclass(frozen=True)
class _Stored:
    """A tensor that transformers reads, as it does slices of safetensors files, by indexing it."""

    files: TensorFiles
    name: str

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.files.read([(self.name, None)])[0]


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        name: what the user called it.
        directory: where its files are.
        gguf_file: name of its file in ``directory`` if it is a GGUF, the first where it is split
            into several, else ``None``.
    """

    name: str
    directory: Path
    gguf_file: str | None = None

    @cached_property
    def gguf_parts(self) -> list[GGUFFile]:
        """The headers of the model's GGUF files, in order; the source must be one."""
        assert self.gguf_file is not None
        return read_parts(self.directory / self.gguf_file)

    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            CheckpointError: it is missing or damaged, or a GGUF file says what is not understood.
            FamilyError: transformers does not know the architecture.
        """
        if self.gguf_file is not None:
            return gguf_config(self.gguf_parts)
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        known = read_config(self.directory)
        check_blocks(self.name, known)
        if known.get("auto_map") and not _is_known(known.get("model_type")):
            raise FamilyError(
                f"{self.name}: transformers does not know {shown(known.get('model_type'))}, and "
                "the model's own code (auto_map in config.json) is never run: choose another model"
            )
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.directory, trust_remote_code=False
            )
        except OSError as error:
            raise CheckpointError(
                f"{self.name}: no readable configuration: {cut(error)}"
            ) from error
        except ValueError as error:
            if _is_known(known.get("model_type")):
                raise CheckpointError(
                    f"{self.name}: config.json is damaged: {cut(error)}"
                ) from error
            raise FamilyError(f"{self.name}: {cut(error)}") from error
        except (StrictDataclassError, *BAD_VALUES) as error:
            raise CheckpointError(f"{self.name}: config.json is damaged: {cut(error)}") from error
        config.__dict__.pop("_model_name_or_path", None)
        try:
            check_settings(config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: config.json is damaged: {error}") from error
        return config

    def bare_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """The model of ``config``, which is not changed, with float32 weights on the meta device.

        Raises:
            CheckpointError: ``config`` does not describe a model.
        """
        from transformers import AutoModelForCausalLM

        own = copy.deepcopy(config)  # which the model marks with its dtype
        with described_by(self.name), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                own, dtype=torch.float32, trust_remote_code=False
            )
        return model

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            CheckpointError: it is missing or damaged, or a GGUF file says what transformers does
                not read, see `as_file_says`.
        """
        from transformers import TOKENIZER_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

        kind: Any = AutoTokenizer
        options: dict[str, Any] = {}
        if self.gguf_file is not None:
            # The class that AutoTokenizer would choose, having read the header once more, slowly.
            classes: Any = TOKENIZER_MAPPING
            kind = classes.get(type(self.config()), PreTrainedTokenizerFast)
            options = {"gguf_file": self.gguf_file}
        try:
            found = kind.from_pretrained(self.directory, trust_remote_code=False, **options)
            if self.gguf_file is not None:
                found = as_file_says(found, self.gguf_parts[0])
            found.decode(found("a")["input_ids"])  # damage may show only in use
            return found
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # tokenizer backends raise bare exceptions of their own
            raise CheckpointError(
                f"{self.name}: the tokenizer in {self.directory} cannot be read ({cut(error)}): "
                "tokenizer.json and tokenizer_config.json belong beside the weights"
            ) from error

    def float_model(
        self, dtype: torch.dtype, decoded: TensorFiles | None = None
    ) -> PreTrainedModel:
        """The whole model with float weights in ``dtype``.

        Args:
            dtype: of the weights.
            decoded: the weights of a GGUF file, or of a directory that another program packed,
                under the model's names; they are read one after another. ``None`` stands for a
                directory that transformers reads.

        Raises:
            QuantineError: weights are missing, unreadable, or not all used; or transformers needs a
                library for them that is not there.
        """
        from transformers import AutoModelForCausalLM

        config = self.config()
        kind: Any = AutoModelForCausalLM
        place: Path | None = self.directory
        options: dict[str, Any] = {}
        if decoded is None:
            float_files(self.directory)
            SafetensorsFiles(self.directory)  # transformers takes the last of two tensors silently
        else:
            config.__dict__.pop("quantization_config", None)
            kind, place = type(self.bare_model(config)), None
            tensors = {name: _Stored(decoded, name) for name in decoded.headers}
            options = {"config": config, "state_dict": tensors}
        try:
            if decoded is not None:
                options["generation_config"] = self._generation()
            loaded: Any = kind.from_pretrained(
                place,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                attn_implementation=attention_of(config),
                **options,
            )
        except ImportError as error:
            raise CheckpointError(
                f"{self.name} cannot be loaded: {cut(error)}; install that, or give the float model"
            ) from error
        except (*UNREADABLE, MemoryError) as error:
            fits = not is_out_of_memory(error)
            said = f"cannot be loaded: {cut(error)}" if fits else "does not fit in memory"
            raise CheckpointError(f"{self.name} {said}") from error
        model, info = loaded
        self._check_loaded(model, info)
        model.eval()
        whole: PreTrainedModel = model
        return whole

    def _generation(self) -> GenerationConfig | None:
        """What stands beside the weights of a directory of how to generate; ``None`` if nothing."""
        from transformers import GenerationConfig

        there = self.gguf_file is None and (self.directory / GENERATION).is_file()
        return GenerationConfig.from_pretrained(self.directory) if there else None

    def _check_loaded(self, model: PreTrainedModel, info: dict[str, Any]) -> None:
        """Refuse a model that transformers completed with random weights, or took only parts of.

        Raises:
            CheckpointError: names of weights are missing, mismatched or unexpected.
        """
        unused = not_understood(model, info["unexpected_keys"])
        for kind, names in (
            ("lacks", info["missing_keys"]),
            ("has other shapes for", [name for name, *_ in info["mismatched_keys"]]),
            ("holds", unused),
        ):
            if names:
                raise CheckpointError(
                    f"{self.name} {kind} {listed(sorted(names))} unlike its config.json: they "
                    "belong to different models, or the download is incomplete"
                )

    def weight_bytes(self) -> int:
        """Bytes of the files that hold weights, headers and metadata included."""
        return sum(file.stat().st_size for file in self._files())

    def file_digests(self) -> dict[str, str]:
        """Hashes (BLAKE2b, 128 bits, hex) of the files that decide what the model computes.

        Returns:
            Hashes by file name.
        """
        config = [] if self.gguf_file is not None else [self.directory / "config.json"]
        return {file.name: _file_digest(file) for file in [*config, *self._files()]}

    def is_quantized(self) -> bool:
        """Whether quantine reads this as packed weights: an output, or a checkpoint of SpQR."""
        return self.quant_method() in {"quantine", "spqr"}

    def quant_method(self) -> str | None:
        """``quant_method`` in config.json, ``None`` where there is none.

        Raises:
            CheckpointError: config.json is damaged.
        """
        if self.gguf_file is not None:
            return None
        found = read_config(self.directory).get("quantization_config")
        method = found.get("quant_method") if isinstance(found, dict) else None
        return method if isinstance(method, str) else None

    def tokenizer_digest(self, tokenizer: Any) -> str:
        """Hash of everything that decides how ``tokenizer`` splits text; see `file_digests`."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return _digest(backend.to_str())
        return _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True))

    def _files(self) -> list[Path]:
        """The files that hold weights."""
        if self.gguf_file is not None:
            return [part.path for part in self.gguf_parts]
        return weight_files(self.directory)


def _is_known(model_type: object) -> bool:
    """Whether transformers knows the architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


@contextmanager
def described_by(name: str) -> Iterator[None]:
    """Inside of this context, errors of an architecture are explained by its ``config.json``.

    Args:
        name: what the user called the model.

    Raises:
        CheckpointError: ``config.json`` does not describe a model.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, ValueError, RuntimeError, *BAD_VALUES) as error:
        raise CheckpointError(
            f"{name}: config.json does not describe a model ({cut(error)}): download it again"
        ) from error


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
