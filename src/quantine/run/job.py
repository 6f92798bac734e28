"""`Job`: a checked request, saying what will be done to which model.

``quantine plan`` prints a job and ``quantine quantize`` carries it out. Both get it from
`quantine.run.prepare.prepare`, so what one accepts the other can complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from quantine.calibrate.segments import Calibration
from quantine.calibrate.setup import TOKENS_PER_BATCH, CalibrationSetup
from quantine.calibrate.shards import batch_samples
from quantine.calibrate.token_stream import begun
from quantine.core.device import CPU, device_facts
from quantine.core.stage_times import StageTimes
from quantine.core.versions import computing_versions
from quantine.families.family import Family
from quantine.families.layers import Layer
from quantine.formats.description import FORMAT_VERSION
from quantine.kernels import backend
from quantine.plan.decision import Decision
from quantine.plan.plan import Plan
from quantine.ranks.ranks import ALONE, Ranks
from quantine.rotation.checkpoint import RotatedCheckpoint
from quantine.rotation.rotated import Rotated
from quantine.run.store import AT_ONCE, SHARDS
from quantine.source.checkpoint import Checkpoint
from quantine.source.model_source import ModelSource
from quantine.source.read_record import ReadRecord
from quantine.source.tensor_files import TensorFiles
from quantine.tuning.segments import TuningText

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NO_LAYER: Final = "not a layer that plans can name"
"""Reason given in the report why `Job.other_matrices` stay in 16 bit."""


@dataclass(frozen=True)
class Job:
    """A checked request: what will be done to which model, with which calibration tokens.

    Attributes:
        source: where the model's files are.
        files: its stored tensors, with float weights whatever kind its files are.
        config: configuration of the source model.
        model: the model without weights, which blocks get while they are worked on.
        family: the model's architecture.
        plan: the request as the user made it.
        decisions: what the plan does, one decision per layer that a plan can quantize, in running
            order.
        calibration: where calibration text comes from and how it is sampled.
        segments: ``[samples, seqlen]`` int64 calibration token ids; ``None`` without calibration.
        tokenizer: tokenizer of the source model.
        unties: whether embedding and head, which share one table in the source, are stored
            separately.
        shapes: those of the model's tensors by name, before a run changes its modules.
        device: where matrices are solved and blocks run.
        ranks: the processes that share the work.
        tuning_text: what the quantized model is tuned on; ``None`` if it is not tuned.
        rotated: how the tensors of the model are made of the source's, which are rotated; ``None``
            takes them as they are.
        table_copied: whether head and table, which are one in the source, become two because hidden
            states are rotated.
        times: is told what the stages of a run take.
    """

    source: ModelSource
    files: TensorFiles
    config: PretrainedConfig
    model: PreTrainedModel
    family: Family
    plan: Plan
    decisions: tuple[Decision, ...]
    calibration: Calibration
    segments: Tensor | None
    tokenizer: Any
    unties: bool
    shapes: Mapping[str, tuple[int, ...]]
    device: torch.device = CPU
    ranks: Ranks = ALONE
    tuning_text: TuningText | None = None
    rotated: Rotated | None = None
    table_copied: bool = False
    times: StageTimes = field(default_factory=StageTimes)

    def scheme_layers(self) -> list[Decision]:
        """The decisions that quantize their layer, in running order."""
        return [decision for decision in self.decisions if decision.scheme is not None]

    def block_schemes(self, index: int) -> list[Decision]:
        """The decisions that quantize a layer of block ``index``, in running order."""
        return [decision for decision in self.scheme_layers() if decision.layer.block == index]

    def observed(self, index: int, group: int) -> Layer:
        """A layer of block ``index`` that reads the input that all layers of ``group`` share."""
        inside = (d.layer for d in self.decisions if d.layer.block == index)
        return next(layer for layer in inside if layer.group == group)

    def block_groups(self, index: int) -> list[int]:
        """The groups of block ``index`` with a layer to quantize, in running order."""
        groups = {d.layer.group for d in self.block_schemes(index)}
        return sorted(group for group in groups if group is not None)

    def block_stages(self, index: int) -> list[list[Layer]]:
        """What is observed at once: of each of `block_groups` a layer, those of experts together.

        In running order, as `observed`. Where tokens have weights, each layer is observed by
        itself.
        """
        if self.plan.loss_weights:
            return [[decision.layer] for decision in self.block_schemes(index)]
        layers = [self.observed(index, group) for group in self.block_groups(index)]
        return [list(stage) for _, stage in groupby(layers, lambda layer: layer.stage)]

    def checkpoint(self, record: ReadRecord | None = None) -> Checkpoint:
        """The float weights of the source model, rotated where the plan says so.

        Args:
            record: see `quantine.source.checkpoint.Checkpoint`.
        """
        if self.rotated is not None:
            return RotatedCheckpoint(self.files, self.model, self.rotated, record)
        return Checkpoint(self.files, self.model, record)

    def calibration_setup(
        self,
        checkpoint: Checkpoint,
        spill: Path | None = None,
        saved: Path | None = None,
        replaced: Mapping[str, Tensor] | None = None,
        resumes: bool = False,
        kept_on: torch.device | None = None,
        batch_tokens: int = TOKENS_PER_BATCH,
    ) -> CalibrationSetup:
        """The calibration segments, and the model they run through.

        There must be calibration segments. Arguments are those of
        `quantine.calibrate.sequential.CalibrationSetup`.
        """
        assert self.segments is not None
        return CalibrationSetup(
            self.model,
            self.family,
            checkpoint,
            self.segments,
            spill,
            saved,
            replaced or {},
            self.calibration.bfloat16,
            resumes,
            self.device,
            kept_on,
            batch_tokens,
            self.calibration.shards,
            self.ranks,
            self.times,
        )

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """Read a float tensor of the source, see `checkpoint`.

        Args:
            checkpoint: the float weights of the source.
            name: what the model calls the tensor.
        """
        return checkpoint.read([name])[name]

    def float_weight(self, checkpoint: Checkpoint, layer: Layer) -> Tensor:
        """The weight of a layer before quantization, ``[out, in]`` float32, on `device`.

        Args:
            checkpoint: the float weights of the source.
            layer: the layer.
        """
        weight = layer.part_of(self.read(checkpoint, layer.stored_name))
        return weight.float().contiguous().to(self.device)

    def loose_names(self) -> list[str]:
        """Names of the output's float tensors outside of decoder blocks."""
        inside = f"{self.family.blocks}."
        return [name for name in self._float_names() if not name.startswith(inside)]

    def block_names(self, index: int) -> list[str]:
        """Names of the output's float tensors in block ``index``."""
        inside = f"{self.family.blocks}.{index}."
        return [name for name in self._float_names() if name.startswith(inside)]

    def _float_names(self) -> list[str]:
        """Names of all float tensors in the output: those that are not quantized."""
        absent = {
            d.layer.stored_name
            for d in self.decisions
            if d.scheme is not None or self.shares_table(d.layer)
        }
        return [name for name in self.model.state_dict() if name not in absent]

    def other_matrices(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the matrices that no plan can name, by tensor name; they stay in 16 bit.

        Examples are position tables, and the projections around the decoder of opt-350m.
        """
        known = {decision.layer.stored_name for decision in self.decisions}
        return {
            name: shape
            for name, shape in self.shapes.items()
            if len(shape) >= 2 and name not in known
        }

    def kept_reason(self, name: str) -> str:
        """Why the matrix ``name``, one of `other_matrices`, stays in 16 bit."""
        inside = f"{self.family.blocks}."
        path = name.removeprefix(inside).partition(".")[2] if name.startswith(inside) else ""
        return dict(self.family.kept).get(path, NO_LAYER)

    def float_dtype(self) -> torch.dtype | None:
        """Dtype of every float tensor in the output, if the format in use demands one."""
        asked = {d.scheme.layout.float_dtype for d in self.scheme_layers() if d.scheme is not None}
        return next((dtype for dtype in asked if dtype is not None), None)

    def linears(self) -> list[str]:
        """Names of all Linear modules of the model, also of those that no plan can name."""
        return [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]

    def segment_length(self) -> int:
        """Number of tokens of a calibration segment; 0 without calibration."""
        return 0 if self.segments is None else self.segments.shape[1]

    def begun(self) -> str:
        """How segments begin, see `quantine.calibrate.token_stream.begun`; ``"none"`` without."""
        return "none" if self.segments is None else begun(self.tokenizer, self.calibration.bos)

    def packed_bytes(self, decision: Decision) -> int:
        """Bytes that a quantized layer will take.

        For a layer that a budget decides about, this is its share of the budget. For one with other
        choices, it is the most that any of them takes.

        Args:
            decision: one that quantizes its layer.
        """
        assert decision.scheme is not None
        if decision.by_budget and self.plan.bits_per_weight is not None:
            return round(decision.layer.weights * self.plan.bits_per_weight / 8)
        choices = decision.choices or (decision.scheme,)
        return max(choice.nbytes(decision.layer) for choice in choices)

    def is_tied(self) -> bool:
        """Whether embedding and output head share one table in the source."""
        return bool(self.config.tie_word_embeddings)

    def shares_table(self, layer: Layer) -> bool:
        """Whether ``layer`` is an output head that has no table of its own in the output."""
        return layer.role == "head" and self.is_tied() and not self.unties

    def identity(self, weights: str | None, batch_tokens: int = TOKENS_PER_BATCH) -> dict[str, str]:
        """Hashes and versions of all that decides the bytes of the output, by what they describe.

        A run may be resumed only with an equal identity.

        Args:
            weights: the digest of the source's weights; ``None`` while they are still to be read.
            batch_tokens: see `quantine.calibrate.sequential.CalibrationSetup`.
        """
        tokens = b"" if self.segments is None else self.segments.numpy().tobytes()
        tuned = self.tuning_text
        return {
            "plan": _hash(json.dumps(self.plan.as_dict(), sort_keys=True).encode()),
            "calibration tokens": _hash(tokens),
            **({} if tuned is None else {"tuning tokens": _hash(tuned.as_bytes())}),
            "calibration bfloat16": str(self.calibration.bfloat16),
            **({} if self.begun() == "none" else {"calibration bos": self.begun()}),
            # Other devices sum floats in other orders; the CPU is what runs always had.
            **({} if self.device == CPU else device_facts(self.device)),
            # Statistics are summed shard after shard, and in each batch after batch.
            **({} if self.calibration.shards == 1 else {SHARDS: str(self.calibration.shards)}),
            **(
                {}
                if self.segments_at_once(batch_tokens) == self.segments_at_once()
                else {AT_ONCE: str(self.segments_at_once(batch_tokens))}
            ),
            "tokenizer": self.source.tokenizer_digest(self.tokenizer),
            **({} if weights is None else {"weights": weights}),
            "config": _hash(self.config.to_json_string().encode()),
            "format version": str(FORMAT_VERSION),
            # Sums of floats depend on how threads and library versions cut them.
            "backend": backend.name(),
            "threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
            **{f"{name} version": found for name, found in computing_versions().items()},
        }

    def segments_at_once(self, batch_tokens: int = TOKENS_PER_BATCH) -> int:
        """Number of segments that go through a block at once."""
        if self.segments is None:
            return 0
        samples, seqlen = self.segments.shape
        return batch_samples(samples, seqlen, batch_tokens, self.calibration.shards)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
