"""Checks a request before a weight is read: whatever can be refused is refused here."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from quantine.activations import attention
from quantine.activations.install import rounded_sites
from quantine.activations.linked import linked_family
from quantine.calibrate.segments import Calibration, calibration_segments
from quantine.calibrate.skeleton import skeleton
from quantine.core.activation_spec import SITES, UNQUANTIZED, ActivationSpec
from quantine.core.ambient import own_state
from quantine.core.device import device_named, device_to_plan
from quantine.core.spec import CLUSTERS
from quantine.errors import (
    CalibrationError,
    CheckpointError,
    FamilyError,
    OutputError,
    PlanError,
)
from quantine.families import family_of
from quantine.families.family import Family
from quantine.families.layers import are_tied, find_layers
from quantine.formats.directory import is_finished
from quantine.formats.imported import is_foreign, source_files
from quantine.methods.adadim import ADADIM
from quantine.plan.decision import Decision, with_clusters
from quantine.plan.plan import Plan
from quantine.rotation.rotated import rotated
from quantine.run.job import Job
from quantine.run.store import check_output
from quantine.source.checkpoint import Checkpoint
from quantine.source.locate import locate
from quantine.source.model_source import ModelSource, described_by
from quantine.source.names import listed
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
        _check_links(family, config, plan.activations)
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
        turned = rotated(bare, family, config, plan.transforms[0].seed)
    layers = find_layers(bare, family)
    decisions, unties = _settle_tie(plan.resolve(layers), bool(config.tie_word_embeddings))
    decisions = [_with_expected_clusters(d, plan.activations, family) for d in decisions]
    _check_fixed(decisions, family)
    _check_inputs(decisions, calibration, plan)
    _check_biases(decisions, bare)
    if plan.tune is not None:
        _check_tuned(decisions)
    if plan.loss_weights:
        _check_weighted(decisions, calibration, plan)
    tokenizer = source.tokenizer()
    text = config.get_text_config()
    known = tokenizer, text.vocab_size, getattr(text, "max_position_embeddings", None)
    segments = calibration_segments(calibration, *known) if calibration.samples else None
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
    _check_headers(job, job.checkpoint())
    return job


def _check_headers(job: Job, checkpoint: Checkpoint) -> None:
    """Compare the shapes in the weight files with those that the architecture needs.

    Args:
        job: the checked request, with the model's shapes.
        checkpoint: the float weights of the source, of which only headers are read.

    Raises:
        CheckpointError: a tensor is missing, has another shape, is not floating point, or has no
            place in the model.
    """
    for name, tensor in job.model.state_dict().items():
        shape = checkpoint.shapes([name]).get(name)
        if shape is None:
            raise CheckpointError(
                f"{job.source.name} holds no tensor {name}: the download may be incomplete, or "
                "the weights belong to another architecture"
            )
        if tensor.is_floating_point():
            checkpoint.dtype(name)
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} has shape {shape}, but config.json implies {tuple(tensor.shape)}"
            )
    if checkpoint.unused:
        raise CheckpointError(
            f"{job.source.name} holds {listed(checkpoint.unused)} for which the model that "
            "config.json describes has no place: give the weights' own config.json, or remove them"
        )


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


def _check_weighted(decisions: list[Decision], calibration: Calibration, plan: Plan) -> None:
    """Refuse weights of tokens where they cannot be had.

    Raises:
        CalibrationError: there are no tokens, or parts of the text are summed on their own.
        PlanError: a layer is quantized that only some tokens reach.
    """
    if not calibration.samples or calibration.shards > 1:
        raise CalibrationError(
            f"loss_weights of plan {plan.name!r} need calibration samples in one shard: give "
            "--samples of at least 1 and --shards 1, or leave them out"
        )
    for decision in decisions:
        if decision.scheme is not None and decision.layer.experts:
            raise PlanError(
                f"{decision.layer.name}: loss_weights are not known for experts, which only some "
                "tokens reach: leave them out"
            )


def _check_links(family: Family, config: PretrainedConfig, spec: ActivationSpec) -> None:
    """Refuse to quantize activations of a model whose block a reorder would change.

    Raises:
        FamilyError: the family has no reorders, or not with this configuration, or none at any of
            the sites that are to be rounded.
    """
    asked = [site for site in SITES if getattr(spec, site) != UNQUANTIZED]
    if asked and not rounded_sites(family, spec):
        raise FamilyError(
            f"activations of {config.model_type} models cannot be quantized at {', '.join(asked)}: "
            "leave out `activations` and `scheme`"
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


def _check_fixed(decisions: list[Decision], family: Family) -> None:
    """Refuse to quantize an embedding or a head that has to stay as it is.

    Raises:
        FamilyError: names it, and why.
    """
    reasons = dict(family.fixed)
    for decision in decisions:
        name = decision.layer.name
        if decision.scheme is not None and name in reasons:
            raise FamilyError(
                f"{name} cannot be quantized: {reasons[name]}; keep it ({decision.reason})"
            )


def _check_tuned(decisions: list[Decision]) -> None:
    """Refuse to tune matrices whose numbers tuning does not know.

    Raises:
        PlanError: names one, and why; or there are none.
    """
    if all(decision.scheme is None and not decision.choices for decision in decisions):
        raise PlanError("the plan quantizes no matrix that could be tuned: leave out `tune`")
    for decision in decisions:
        used = decision.choices or (() if decision.scheme is None else (decision.scheme,))
        why = None
        if used and decision.layer.experts:
            why = "mixtures of experts are not tuned yet"
        elif any(scheme.spec.blocked for scheme in used):
            why = "grids of llama.cpp's types are not tuned yet"
        if why is not None:
            raise PlanError(f"{decision.layer.name}: {why}: leave out `tune`")


def _check_inputs(decisions: list[Decision], calibration: Calibration, plan: Plan) -> None:
    """Refuse methods and activations that need calibration, without calibration samples.

    Raises:
        CalibrationError: something needs samples, but there are none.
    """
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
    """Refuse layers with a bias in a format whose other readers drop biases.

    Raises:
        PlanError: there is one; the message names the layer.
    """
    for decision in decisions:
        scheme, layer = decision.scheme, decision.layer
        if scheme is None or scheme.layout.holds_bias:
            continue
        if getattr(model.get_submodule(layer.module or layer.name), "bias", None) is not None:
            raise PlanError(
                f"{layer.name} has a bias, which the other readers of format {scheme.format} drop: "
                f"use format sparse in the rule that matches it ({decision.reason})"
            )
