"""Everything that can be known, and refused, before a weight is read.

`quantine plan` prints a `Job`; `quantine quantize` runs one. Both go through `prepare`, so what
one accepts the other completes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from quantine.activations import attention
from quantine.calibrate.data import Calibration, calibration_segments
from quantine.calibrate.sequential import skeleton
from quantine.core.activation import ActivationSpec
from quantine.core.cluster import check_installed
from quantine.core.spec import CLUSTERS
from quantine.errors import (
    CalibrationError,
    CheckpointError,
    FamilyError,
    OutputError,
    PlanError,
)
from quantine.families import family_of
from quantine.families.base import Family, Layer, find_layers
from quantine.formats import FORMAT_VERSION
from quantine.formats.checkpoint import Checkpoint
from quantine.formats.store import check_output, is_finished
from quantine.kernels import backend
from quantine.plan import Decision, Plan, with_clusters
from quantine.runtime.source import ModelSource, locate
from quantine.scheme import ADADIM, SPQR

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NO_LAYER: Final = "not a layer that plans can name"
"""Why `Job.other_matrices` stay in 16 bit."""
DISK_RESERVE: Final = 64_000_000


@dataclass(frozen=True)
class Job:
    """A checked request: what will be done to which model with which calibration tokens.

    Attributes:
        segments: ``[samples, seqlen]`` int64 token ids; ``None`` without calibration.
        decisions: one per matrix a plan can quantize, in running order.
        unties: whether table and head, tied in the source, are stored separately.
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

    def scheme_layers(self) -> list[Decision]:
        """The decisions that quantize something."""
        return [decision for decision in self.decisions if decision.scheme is not None]

    def block_schemes(self, index: int) -> list[Decision]:
        """The decisions that quantize something inside block ``index``."""
        return [decision for decision in self.scheme_layers() if decision.layer.block == index]

    def checkpoint(self, directory: Path | None = None) -> Checkpoint:
        """The float weights, in ``directory`` if they were converted there."""
        return Checkpoint(
            directory or self.source.directory,
            self.model.base_model_prefix,
            self.family.renames,
        )

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
            f"{d.layer.name}.weight"
            for d in self.decisions
            if d.scheme is not None or self.shares_table(d.layer)
        }
        return [name for name in self.model.state_dict() if name not in absent]

    def other_matrices(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the matrices no plan can name, by tensor name: they stay in 16 bit.

        Such are position tables, and the projections around the decoder of opt-350m.
        """
        known = {f"{decision.layer.name}.weight" for decision in self.decisions}
        return {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if tensor.ndim >= 2 and name not in known
        }

    def writes_spqr(self) -> bool:
        """Whether the output takes the form that other readers of layout ``spqr`` need."""
        return any(d.scheme is not None and d.scheme.format == SPQR for d in self.decisions)

    def linears(self) -> list[str]:
        """Names of all Linear modules, those that no plan can name included."""
        return [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]

    def segment_length(self) -> int:
        """Tokens of a calibration segment; 0 without calibration."""
        return 0 if self.segments is None else self.segments.shape[1]

    def packed_bytes(self, decision: Decision) -> int:
        """Bytes a quantized layer will take; of a searched one its share of the budget.

        Of one that chooses otherwise, the most that it may take.
        """
        assert decision.scheme is not None
        if decision.searched and self.plan.bits_per_weight is not None:
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


def prepare(model: str | Path, plan: Plan, calibration: Calibration) -> Job:
    """Check a request against a model without reading weights.

    Raises:
        QuantineError: of the kind that says what is wrong; see `quantine.errors`.
    """
    source = locate(model)
    if source.is_quantized():
        raise CheckpointError(f"{source.name} is already quantized: give the float model")
    config = source.config()
    found = getattr(config, "quantization_config", None)
    if found is not None:
        raise CheckpointError(
            f"{source.name} is already quantized (its config.json has a quantization_config): "
            "give the float model"
        )
    family = family_of(config.model_type)
    if plan.activations is not None:
        _check_links(family, config)
        if plan.activations.reorders:
            check_installed()
    bare = _skeleton(source, config, plan.activations is not None)
    layers = find_layers(bare, family)
    decisions, unties = _settle_tie(plan.resolve(layers), bool(config.tie_word_embeddings))
    decisions = [_with_expected_clusters(d, plan.activations, family) for d in decisions]
    _check_inputs(decisions, calibration, plan)
    _check_biases(decisions, bare)
    tokenizer = source.tokenizer()
    segments = None
    if calibration.samples:
        longest = getattr(config, "max_position_embeddings", None)
        segments = calibration_segments(calibration, tokenizer, config.vocab_size, longest)
    job = Job(
        source,
        config,
        bare,
        family,
        plan,
        tuple(decisions),
        calibration,
        segments,
        tokenizer,
        unties,
    )
    if source.gguf_file is None:
        check_headers(job, job.checkpoint())
    return job


def check_headers(job: Job, checkpoint: Checkpoint) -> None:
    """Compare the shapes in the weight files with the architecture's.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not floating point.
    """
    for name, tensor in job.model.state_dict().items():
        stored = job.stored_name(name)
        shape = checkpoint.shapes([stored]).get(stored)
        if shape is None:
            raise CheckpointError(
                f"{job.source.name} holds no tensor {stored}: the download may be incomplete, or "
                "the weights belong to another architecture"
            )
        if tensor.is_floating_point():
            checkpoint.dtype(stored)
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{stored} has shape {shape}, but config.json implies {tuple(tensor.shape)}"
            )


def check_place(out: Path, resume: bool, needed: int) -> None:
    """Refuse an output path that is taken, or a disk that is too small, before work starts.

    Args:
        needed: bytes the run will write at most.

    Raises:
        OutputError: says which.
    """
    try:
        check_output(out, resume)
    except OSError as error:
        raise OutputError(f"{out} cannot be an output directory: {error}") from error
    if is_finished(out):
        return
    existing = next(p for p in [out, *out.absolute().parents] if p.exists())
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    if free < needed + DISK_RESERVE:
        raise OutputError(
            f"{out} needs about {needed / 1e9:.2f} GB while it is made, but the disk has "
            f"{free / 1e9:.2f} GB free"
        )


def _check_links(family: Family, config: PretrainedConfig) -> None:
    """Refuse activations where reorders would change what a block computes."""
    if not family.links or not family.attention:
        raise FamilyError(
            f"activations of {config.model_type} models cannot be quantized yet: leave out "
            "`activations` and `scheme`"
        )
    for field, value in family.links_need:
        if getattr(config, field) != value:
            raise FamilyError(
                f"activations can be quantized only where {field} is {value}, not "
                f"{getattr(config, field)}: leave out `activations` and `scheme`"
            )


def _with_expected_clusters(
    decision: Decision, spec: ActivationSpec | None, family: Family
) -> Decision:
    """The decision with as many clusters as its layer's inputs will have, of any sizes."""
    layer, scheme = decision.layer, decision.scheme
    if scheme is None or not scheme.spec.clustered:
        return decision
    path = layer.name.removeprefix(f"{family.blocks}.{layer.block}.")
    kinds = [link.kind for link in family.links if path in link.consumers]
    if spec is None or not kinds:
        raise PlanError(
            f"{layer.name} has no clusters of inputs (group_size {CLUSTERS}, {decision.reason}): "
            "give a group_size, or a scheme such as W4A4 that makes clusters"
        )
    count = min(spec.clusters_of(kinds[0]), layer.in_features)
    sizes = (layer.in_features - count + 1, *[1] * (count - 1))
    return with_clusters(decision, sizes)


def _skeleton(source: ModelSource, config: PretrainedConfig, rounds: bool) -> PreTrainedModel:
    try:
        return skeleton(config, attention.NAME if rounds else None)
    except Exception as error:  # a damaged value fails wherever the architecture first uses it
        raise CheckpointError(
            f"{source.name}: config.json does not describe a model ({error!r}): download it again"
        ) from error


def _settle_tie(decisions: list[Decision], tied: bool) -> tuple[list[Decision], bool]:
    """Let the head of a tied model share the table, unless a rule gives it its own scheme."""
    table = next(d for d in decisions if d.layer.role == "embedding")
    head = next(d for d in decisions if d.layer.role == "head")
    if not tied:
        return decisions, False
    if head.rule is not None and head.scheme != table.scheme:
        return decisions, True
    shared = replace(head, scheme=None, reason=f"shares the table of {table.layer.name}")
    return [shared if d is head else d for d in decisions], False


def _check_inputs(decisions: list[Decision], calibration: Calibration, plan: Plan) -> None:
    if plan.activations is not None and not calibration.samples:
        raise CalibrationError(
            "grids of activations need calibration samples: samples must be at least 1"
        )
    needing = [decision for decision in decisions if decision.needs_inputs]
    if needing and not calibration.samples:
        first = needing[0]
        assert first.scheme is not None
        method = ADADIM if first.choices else first.scheme.method
        raise CalibrationError(
            f"{first.layer.name} is to be solved by {method}, which needs calibration "
            "samples: samples must be at least 1"
        )


def _check_biases(decisions: list[Decision], model: PreTrainedModel) -> None:
    for decision in decisions:
        scheme, name = decision.scheme, decision.layer.name
        if scheme is None or scheme.format != SPQR:
            continue
        if getattr(model.get_submodule(name), "bias", None) is not None:
            raise PlanError(
                f"{name} has a bias, which the other readers of format {SPQR} drop: use format "
                f"sparse in the rule that matches it ({decision.reason})"
            )


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
