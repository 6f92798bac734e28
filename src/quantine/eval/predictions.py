"""Predictions of a reference model, computed once and kept on disk.

The prediction for a window is one safetensors file of about ``2 * window * vocabulary`` bytes. It
holds log-probabilities in float16, which changes divergences by some 1e-5 nats, and the most likely
tokens and the loss exactly.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quantine.core.device import device_named
from quantine.errors import OutputError
from quantine.eval.perplexity import ROWS_AT_ONCE, Prediction, Windows, predict
from quantine.formats.directory import read_json, write_json, writing
from quantine.formats.shards import write_tensors
from quantine.kernels import backend
from quantine.runtime.load import load_model
from quantine.source.model_source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST: Final = -60_000.0
"""Smallest log-probability that is stored, as float16 does not reach much lower."""
ABOUT: Final = "model.json"
"""Name of the file that says which model a directory of predictions belongs to."""


class Predictions:
    """The predictions of a reference model, which is loaded only if some are not on disk yet.

    Called with a window's tokens, it gives the prediction. With a cache, a model's predictions are
    in a directory named by a hash of the model's files, the dtype, the backend, the type of device
    and the versions of the libraries that compute; a window's file is named by a hash of its
    tokens, and by how many of them are context if these are several. So a window of the same tokens
    is found again, whatever text, tokenizer and limit it comes from, and none is that begins
    otherwise.

    Args:
        source: the reference model.
        dtype: dtype of activations and of weights that are not quantized.
        cache: directory shared by all reference models, made if missing; ``None`` keeps nothing.
        device: device of the computation, by PyTorch's name.

    Raises:
        BackendUnavailable: there is no such device.
    """

    def __init__(
        self,
        source: ModelSource,
        dtype: torch.dtype,
        cache: Path | None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.source = source
        self._dtype = dtype
        self._cache = cache
        self._device = device_named(device)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The reference model, loaded when it is first needed."""
        return load_model(self.source, self._dtype, self._device)

    @cached_property
    def directory(self) -> Path | None:
        """The directory of this model's predictions, made if missing; ``None`` without a cache.

        Raises:
            OutputError: it cannot be made.
        """
        if self._cache is None:
            return None
        about: dict[str, Any] = {
            "files": self.source.file_digests(),
            "dtype": str(self._dtype),
            "backend": backend.name(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        if self._device.type != "cpu":  # whose sums round otherwise
            about["device"] = self._device.type
        path = self._cache / _hash(json.dumps(about, sort_keys=True).encode())
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / ABOUT, {"model": self.source.name, **about})
        except OSError as error:
            raise OutputError(
                f"predictions cannot be kept in {path} ({error.strerror}): choose another cache"
            ) from error
        return path

    def reserve(self, texts: Iterable[Windows]) -> None:
        """Check that the predictions that are not on disk yet will fit there.

        Args:
            texts: the windows of each text.

        Raises:
            OutputError: the disk has too little room.
        """
        if self.directory is None:
            return
        vocabulary = self.source.config().vocab_size
        needed = sum(
            (len(tokens) - windows.context) * (2 * vocabulary + 8)
            for windows in texts
            for tokens in windows.tokens
            if not self._path(tokens, windows.context).is_file()
        )
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise OutputError(
                f"the predictions of {self.source.name} take {needed / 1e9:.1f} GB, but the disk "
                f"of {self.directory} has {free / 1e9:.1f} GB free: set a smaller limit, or "
                "another cache"
            )

    def __call__(self, tokens: Tensor, context: int = 1) -> Prediction:
        """The prediction for a window, from disk if it is there.

        Args:
            tokens: token ids ``[window]`` int64.
            context: number of first tokens that are not scored.

        Raises:
            OutputError: a file in the cache is damaged, or the disk is full.
        """
        if self.directory is None:
            return predict(self.model, tokens, context)
        path = self._path(tokens, context)
        if path.is_file():
            return _read(path)
        made = predict(self.model, tokens, context)
        _write(path, made)
        return made

    def recall(self, name: str) -> Any:
        """The plain data that `remember` stored as ``name``; ``None`` if there is none."""
        path = None if self.directory is None else self.directory / f"{name}.json"
        return read_json(path) if path is not None and path.is_file() else None

    def remember(self, name: str, value: object) -> None:
        """Store plain data as ``name`` beside the predictions; without a cache, do nothing.

        Raises:
            OutputError: it cannot be stored.
        """
        if self.directory is not None:
            path = self.directory / f"{name}.json"
            with writing(path):
                write_json(path, value)

    def _path(self, tokens: Tensor, context: int) -> Path:
        assert self.directory is not None
        name = _hash(tokens.contiguous().numpy().tobytes())
        return self.directory / f"{name}{'' if context == 1 else f'-{context}'}.safetensors"


def _read(path: Path) -> Prediction:
    try:
        tensors = load_file(path)
        return Prediction(tensors["log_probs"], tensors["top"], float(tensors["loss"]))
    except (SafetensorError, KeyError) as error:
        raise OutputError(f"{path} is damaged ({error}): delete it") from error


def _write(path: Path, made: Prediction) -> None:
    log_probs = torch.empty_like(made.logits, dtype=torch.float16, device="cpu")
    for start in range(0, len(log_probs), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_probs[rows] = made.logits[rows].float().log_softmax(-1).clamp(min=LEAST).half()
    loss = torch.tensor(made.loss, dtype=torch.float64, device="cpu")
    with writing(path):
        write_tensors(path, {"log_probs": log_probs, "top": made.top.cpu(), "loss": loss})


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
