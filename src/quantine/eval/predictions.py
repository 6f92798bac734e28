"""What a reference model predicts, computed once and kept on disk.

A prediction is one safetensors file of about ``2 * window * vocabulary`` bytes: log-probabilities
in float16, which blurs divergences by some 1e-5 nats, the most likely tokens and the loss exactly.
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
from quantine.eval.perplexity import ROWS_AT_ONCE, Prediction, predict
from quantine.formats.directory import read_json, write_json
from quantine.formats.shards import write_tensors
from quantine.kernels import backend
from quantine.runtime.load import load_model
from quantine.source.locate import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST: Final = -60_000.0
"""Log-probability that stands for all below it, which float16 does not have."""
ABOUT: Final = "model.json"
"""File that says which model a directory of predictions belongs to."""


class Predictions:
    """A reference model, loaded only if something it says is not on disk yet.

    With a cache, everything is kept in a directory named by a hash of the model's files, the
    computation's dtype, and the versions of the libraries that compute; a window's file is named
    by a hash of its tokens. Text, tokenizer, window and limit decide nothing else.

    Args:
        source: the reference model.
        dtype: of the computation.
        cache: directory shared by all models; ``None`` keeps nothing.
        device: of the computation.

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
        """The model itself."""
        return load_model(self.source, self._dtype, self._device)

    @cached_property
    def directory(self) -> Path | None:
        """Where this model's predictions are kept, made if missing.

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
            raise OutputError(f"predictions cannot be kept in {path}: {error}") from error
        return path

    def reserve(self, texts: Iterable[Tensor]) -> None:
        """Check that the predictions of all windows of ``texts`` fit on the disk.

        Args:
            texts: ``[windows, window]`` int64 each.

        Raises:
            OutputError: they do not.
        """
        if self.directory is None:
            return
        vocabulary = self.source.config().vocab_size
        needed = sum(
            (len(tokens) - 1) * (2 * vocabulary + 8)
            for windows in texts
            for tokens in windows
            if not self._path(tokens).is_file()
        )
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise OutputError(
                f"the predictions of {self.source.name} take {needed / 1e9:.1f} GB, but the disk "
                f"of {self.directory} has {free / 1e9:.1f} GB free: set a smaller limit, or "
                "another cache"
            )

    def __call__(self, tokens: Tensor) -> Prediction:
        """The prediction for ``tokens`` ``[window]`` int64.

        Raises:
            OutputError: a file in the cache is damaged, or the disk is full.
        """
        if self.directory is None:
            return predict(self.model, tokens)
        path = self._path(tokens)
        if path.is_file():
            return _read(path)
        made = predict(self.model, tokens)
        _write(path, made)
        return made

    def recall(self, name: str) -> Any:
        """Plain data that `remember` kept under ``name``, or ``None``."""
        path = None if self.directory is None else self.directory / f"{name}.json"
        return read_json(path) if path is not None and path.is_file() else None

    def remember(self, name: str, value: object) -> None:
        """Keep plain data beside the predictions."""
        if self.directory is not None:
            write_json(self.directory / f"{name}.json", value)

    def _path(self, tokens: Tensor) -> Path:
        assert self.directory is not None
        return self.directory / f"{_hash(tokens.contiguous().numpy().tobytes())}.safetensors"


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
    try:
        write_tensors(path, {"log_probs": log_probs, "top": made.top.cpu(), "loss": loss})
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
