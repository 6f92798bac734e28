"""A checked request: what will be done to which model.

`quantine plan` prints a `Job`; `quantine quantize` carries it out. Both go through
`quantine.run.prepare.prepare`, so what one accepts the other completes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from quantine.calibrate.segments import Calibration
from quantine.calibrate.sequential import CalibrationSetup
from quantine.calibrate.share import EVERYTHING, Share
from quantine.core.device import CPU
from quantine.families.family import Family
from quantine.families.layers import Layer
from quantine.formats.description import FORMAT_VERSION
from quantine.kernels import backend
from quantine.plan.decision import Decision
from quantine.plan.plan import Plan
from quantine.source.checkpoint import Checkpoint
from quantine.source.locate import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NO_LAYER: Final = "not a layer that plans can name"
"""Why `Job.other_matrices` stay in 16 bit."""


@dataclass(frozen=True)
class Job:
    """A checked request: what will be done to which model with which calibration tokens.

    Attributes:
        segments: ``[samples, seqlen]`` int64 token ids; ``None`` without calibration.
        decisions: one per matrix a plan can quantize, in running order.
        unties: whether table and head, tied in the source, are stored separately.
        device: where matrices are solved, and blocks run.
        share: which part of the work this process does.
    """

    source: ModelSource
    config: PretrainedConfig
    model: PreTrainedModel
    family: Family
    plan: Plan
    decisions: tuple[Decision, ...]
    calibration: Calibration
    segments: Tensor | None
    tokenizer: Any
    unties: bool
    device: torch.device = CPU
    share: Share = EVERYTHING

    def scheme_layers(self) -> list[Decision]:
        """The decisions that quantize something."""
        return [decision for decision in self.decisions if decision.scheme is not None]

    def block_schemes(self, index: int) -> list[Decision]:
        """The decisions that quantize something inside block ``index``."""
        return [decision for decision in self.scheme_layers() if decision.layer.block == index]

    def observed(self, index: int, group: int) -> Layer:
        """A layer of block ``index`` that reads what every layer of ``group`` reads."""
        inside = (d.layer for d in self.decisions if d.layer.block == index)
        return next(layer for layer in inside if layer.group == group)

    def block_groups(self, index: int) -> list[int]:
        """The groups of block ``index`` that have something to quantize, in running order."""
        groups = {d.layer.group for d in self.block_schemes(index)}
        return sorted(group for group in groups if group is not None)

    def checkpoint(self, directory: Path | None = None) -> Checkpoint:
        """The float weights, in ``directory`` if they were converted there."""
        return Checkpoint(
            directory or self.source.directory,
            self.model.base_model_prefix,
            self.family.renames,
        )

    def calibration_setup(
        self,
        checkpoint: Checkpoint,
        spill: Path | None = None,
        replaced: Mapping[str, Tensor] | None = None,
        resumes: bool = False,
    ) -> CalibrationSetup:
        """The calibration segments of this process, and the model they run through.

        There must be some; arguments are those of `CalibrationSetup`.
        """
        assert self.segments is not None
        return CalibrationSetup(
            self.model,
            self.family,
            checkpoint,
            self.share.segments(self.segments),
            spill,
            replaced or {},
            self.calibration.bfloat16,
            resumes,
            self.device,
        )

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """The float tensor that the model calls ``name``, as it is stored."""
        stored = self.stored_name(name)
        return checkpoint.read([stored])[stored]

    def float_weight(self, checkpoint: Checkpoint, layer: Layer) -> Tensor:
        """The weight of ``layer`` before quantization, ``[out, in]`` float32, on `device`."""
        weight = layer.part_of(self.read(checkpoint, layer.stored_name))
        return weight.float().contiguous().to(self.device)

    def loose_names(self) -> list[str]:
        """Names of the float tensors outside of decoder blocks that the output holds."""
        inside = f"{self.family.blocks}."
        return [name for name in self._float_names() if not name.startswith(inside)]

    def block_names(self, index: int) -> list[str]:
        """Names of the float tensors of block ``index`` that the output holds."""
        inside = f"{self.family.blocks}.{index}."
        return [name for name in self._float_names() if name.startswith(inside)]

    def _float_names(self) -> list[str]:
        """Names of all float tensors that the output holds."""
        absent = {
            d.layer.stored_name
            for d in self.decisions
            if d.scheme is not None or self.shares_table(d.layer)
        }
        return [name for name in self.model.state_dict() if name not in absent]

    def other_matrices(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the matrices no plan can name, by tensor name: they stay in 16 bit.

        Such are position tables, and the projections around the decoder of opt-350m.
        """
        known = {decision.layer.stored_name for decision in self.decisions}
        return {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if tensor.ndim >= 2 and name not in known
        }

    def float_dtype(self) -> torch.dtype | None:
        """Dtype of every float in the output, where the plan's format asks for one."""
        asked = {d.scheme.layout.float_dtype for d in self.scheme_layers() if d.scheme is not None}
        return next((dtype for dtype in asked if dtype is not None), None)

    def linears(self) -> list[str]:
        """Names of all Linear modules, those that no plan can name included."""
        return [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]

    def segment_length(self) -> int:
        """Tokens of a calibration segment; 0 without calibration."""
        return 0 if self.segments is None else self.segments.shape[1]

    def packed_bytes(self, decision: Decision) -> int:
        """Bytes a quantized layer will take; of one that a budget decides about its share of that.

        Of one that chooses otherwise, the most that it may take.
        """
        assert decision.scheme is not None
        if decision.by_budget and self.plan.bits_per_weight is not None:
            return round(decision.layer.weights * self.plan.bits_per_weight / 8)
        choices = decision.choices or (decision.scheme,)
        return max(choice.nbytes(decision.layer) for choice in choices)

    def is_tied(self) -> bool:
        """Whether the source shares one table between embedding and head."""
        return bool(self.config.tie_word_embeddings)

    def shares_table(self, layer: Layer) -> bool:
        """Whether ``layer`` is a head that reads the embedding's table in the output too."""
        return layer.role == "head" and self.is_tied() and not self.unties

    def stored_name(self, name: str) -> str:
        """Where the source keeps the tensor that the model calls ``name``."""
        head = f"{self.family.head}.weight"
        return f"{self.family.embedding}.weight" if self.is_tied() and name == head else name

    def identity(self, weights: str) -> dict[str, str]:
        """Hashes of all that decides the output bytes; ``weights`` is the checkpoint's digest."""
        tokens = b"" if self.segments is None else self.segments.numpy().tobytes()
        return {
            "plan": _hash(json.dumps(self.plan.as_dict(), sort_keys=True).encode()),
            "calibration tokens": _hash(tokens),
            "calibration bfloat16": str(self.calibration.bfloat16),
            "tokenizer": self.source.tokenizer_digest(self.tokenizer),
            "weights": weights,
            "config": _hash(self.config.to_json_string().encode()),
            "format version": str(FORMAT_VERSION),
            # Sums of floats depend on how threads and library versions cut them.
            "backend": backend.name(),
            "threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
            **{f"{name} version": version(name) for name in ("quantine", "torch", "transformers")},
        }


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
