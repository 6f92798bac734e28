"""Checks a request before a weight is read: whatever can be refused is refused here."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from quantine.activations import attention
from quantine.activations.linked import linked_family
from quantine.calibrate.segments import Calibration, calibration_segments
from quantine.calibrate.skeleton import skeleton
from quantine.core.activation_spec import ActivationSpec
from quantine.core.ambient import own_state
from quantine.core.device import device_named, device_to_plan
from quantine.core.spec import CLUSTERS
from quantine.errors import CheckpointError, OutputError, PlanError
from quantine.families import family_of
from quantine.families.family import Family
from quantine.families.layers import are_tied, find_layers
from quantine.families.rotary import turns_of
from quantine.formats.directory import is_finished
from quantine.formats.imported import is_foreign, source_files
from quantine.plan.decision import Decision, with_clusters
from quantine.plan.plan import Plan
from quantine.rotation.rotate import rotate
from quantine.run.job import Job
from quantine.run.request_checks import (
    check_biases,
    check_compensated,
    check_fixed,
    check_headers,
    check_inputs,
    check_links,
    check_tuned,
    check_weighted,
)
from quantine.run.store import check_output
from quantine.source.checkpoint import Checkpoint
from quantine.source.locate import locate
from quantine.source.model_source import ModelSource, described_by
from quantine.source.tensor_files import TensorFiles
from quantine.source.weight_files import float_files
from quantine.tuning.segments import tuning_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DISK_RESERVE: Final = 64_000_000
"""Bytes of disk space that a run leaves free beside what it is expected to write."""


@own_state()
def prepare(
    model: str | Path,
    plan: Plan,
    calibration: Calibration,
    device: str | torch.device = "cpu",
    *,
    planned: bool = False,
) -> Job:
    """Check a request against a model, without reading weights.

    There is one exception: a head that is stored beside its table is compared with it.

    Args:
        model: where the model is, see `quantine.source.locate.locate`.
        plan: what is done to which matrix.
        calibration: where calibration text comes from and how it is sampled.
        device: where matrices will be solved and blocks run.
        planned: whether the job is only looked at, so that ``device`` need not be there.

    Raises:
        QuantineError: the request cannot be carried out; the class says why, see `quantine.errors`.
    """
    where = device_to_plan(device) if planned else device_named(device)
    source = locate(model)
    if source.is_quantized():
        raise CheckpointError(f"{source.name} is already quantized: give the float model")
    config = source.config()
    foreign = is_foreign(source)
    if foreign:
        config.__dict__.pop("quantization_config")
    found = getattr(config, "quantization_config", None)
    if found is not None:
        raise CheckpointError(
            f"{source.name} is already quantized (its config.json has a quantization_config): "
            "give the float model"
        )
    files = source_files(source)
    family = family_of(config) if plan.activations is None else linked_family(config)
    rounds = plan.activations is not None and family.attends
    if plan.activations is not None:
        check_links(family, config, plan.activations)
    bare = _skeleton(source, config, rounds)
    if source.gguf_file is None and not foreign and _has_own_head(source, files, bare):
        # The contents count: transformers, too, ties only what is equal.
        config.tie_word_embeddings = False
        bare = _skeleton(source, config, rounds)
    if not are_tied(bare, family.embedding, family.head):
        config.tie_word_embeddings = False  # some architectures never tie, whatever it says
    turned, copied = None, False
    if plan.transforms:
        # The norm before the head changes it, but not the table.
        copied = bool(config.tie_word_embeddings)
        config.tie_word_embeddings = False
        bare = _skeleton(source, config, rounds)
        turned = rotate(bare, family, config, plan.transforms[0].seed)
    if plan.activations is not None and plan.activations.centred_keys:
        turns_of(bare)  # refuses what has none
    layers = find_layers(bare, family)
    decisions, unties = _settle_tie(plan.resolve(layers), bool(config.tie_word_embeddings))
    decisions = [_with_expected_clusters(d, plan.activations, family) for d in decisions]
    check_fixed(decisions, family)
    check_inputs(decisions, calibration, plan)
    check_biases(decisions, bare)
    if plan.tune is not None:
        check_tuned(decisions)
    if plan.loss_weights:
        check_weighted(decisions, calibration, plan)
    tokenizer = source.tokenizer()
    text = config.get_text_config()
    known = tokenizer, text.vocab_size, getattr(text, "max_position_embeddings", None)
    segments = None
    if calibration.samples:
        # Tuning would find compensation too good on text that it was made of, and undo itself.
        segments = calibration_segments(calibration, *known, holds_out=plan.compensate)
    if plan.compensate:
        check_compensated(decisions, calibration, segments, plan, family)
    tuning = None if plan.tune is None else tuning_text(calibration, plan.tune, *known)
    job = Job(
        source,
        files,
        config,
        bare,
        family,
        plan,
        tuple(decisions),
        calibration,
        segments,
        tokenizer,
        unties,
        {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()},
        where,
        tuning_text=tuning,
        rotated=turned,
        table_copied=copied,
    )
    check_headers(job, job.checkpoint())
    return job


def check_output_path(out: Path, resume: bool, needed: int) -> None:
    """Check that the output path is free and that the disk has room, before work starts.

    Args:
        out: the output directory.
        resume: whether an unfinished run there may be continued.
        needed: most bytes that the run will write.

    Raises:
        OutputError: the path is taken or cannot be written, or the disk is too small.
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


def _with_expected_clusters(
    decision: Decision, spec: ActivationSpec | None, family: Family
) -> Decision:
    """The decision with as many clusters as the layer's inputs will have, with sizes made up.

    Raises:
        PlanError: groups are to be clusters, but the layer's inputs have none.
    """
    layer, scheme = decision.layer, decision.scheme
    if scheme is None or not scheme.spec.clustered:
        return decision
    path = layer.name.removeprefix(f"{family.blocks}.{layer.block}.")
    if spec is None or layer.block is None:
        raise PlanError(
            f"{layer.name} has no clusters of inputs (group_size {CLUSTERS}, {decision.reason}): "
            "give a group_size, or a scheme such as W4A4 that makes clusters"
        )
    links = family.in_block(layer.block).links
    kinds = [link.kind for link in links if path in link.consumers]
    count = min(spec.clusters_of(kinds[0]), layer.in_features) if kinds else 1
    sizes = (layer.in_features - count + 1, *[1] * (count - 1))
    return with_clusters(decision, sizes)


def _skeleton(source: ModelSource, config: PretrainedConfig, rounds: bool) -> PreTrainedModel:
    """The model without weights; its attention can round activations if ``rounds``.

    Raises:
        CheckpointError: ``config.json`` does not describe a model.
    """
    if rounds:
        attention.register()
    with described_by(source.name):
        return skeleton(config, attention.NAME if rounds else None)


def _has_own_head(source: ModelSource, files: TensorFiles, model: PreTrainedModel) -> bool:
    """Whether the files of a model that ``config.json`` calls tied hold a head unlike its table.

    Raises:
        CheckpointError: the files cannot be read.
    """
    float_files(source.directory)
    checkpoint = Checkpoint(files, model)
    pairs = model.all_tied_weights_keys.items()
    there = [pair for pair in pairs if pair[0] in checkpoint and pair[1] in checkpoint]
    return not all(checkpoint.are_equal(*pair) for pair in there)


def _settle_tie(decisions: list[Decision], tied: bool) -> tuple[list[Decision], bool]:
    """Let the head of a tied model share the table, unless a rule gives it another scheme.

    Returns:
        The decisions, and whether table and head are stored separately although they are tied.
    """
    table = next(d for d in decisions if d.layer.role == "embedding")
    head = next(d for d in decisions if d.layer.role == "head")
    if not tied:
        return decisions, False
    if head.rule is not None and head.scheme != table.scheme:
        return decisions, True
    shared = replace(head, scheme=None, reason=f"shares the table of {table.layer.name}")
    return [shared if d is head else d for d in decisions], False
