"""What a request is refused for, once it is known what it does to which matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from quantine.activations.install import rounded_sites
from quantine.calibrate.compensation import may_write
from quantine.calibrate.segments import Calibration
from quantine.calibrate.setup import TOKENS_PER_BATCH
from quantine.core.activation_spec import SITES, UNQUANTIZED, ActivationSpec
from quantine.errors import CalibrationError, CheckpointError, FamilyError, PlanError
from quantine.families.family import Family
from quantine.plan.decision import Decision
from quantine.plan.plan import Plan
from quantine.run.job import Job
from quantine.source.checkpoint import Checkpoint
from quantine.source.names import listed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def check_headers(job: Job, checkpoint: Checkpoint) -> None:
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


def check_weighted(decisions: list[Decision], calibration: Calibration, plan: Plan) -> None:
    """Refuse weights of tokens where they cannot be had.

    Raises:
        CalibrationError: there are no tokens, or parts of the text are summed on their own.
        PlanError: a layer is quantized that only some tokens reach, or none by what tokens say.
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
    if not any(_asks_tokens(decision) for decision in decisions):
        raise PlanError(
            f"no matrix of plan {plan.name!r} is solved by what tokens say of it, so loss_weights "
            "would change nothing: leave them out, or use gptq, spqr or a budget"
        )


def check_compensated(
    decisions: list[Decision],
    calibration: Calibration,
    segments: Tensor | None,
    plan: Plan,
    family: Family,
) -> None:
    """Refuse that matrices make up for errors before them where none would.

    Args:
        decisions: what happens to each layer.
        calibration: the text.
        segments: token ids that were cut from it.
        plan: the plan.
        family: the model's architecture.

    Raises:
        CalibrationError: there are too few tokens, or parts of the text are summed on their own.
        PlanError: nothing is solved on calibration text, or no matrix writes to hidden states.
    """
    samples, tokens = (0, 0) if segments is None else (len(segments), segments.numel())
    least = 2 * TOKENS_PER_BATCH
    if tokens < least or samples < 2 or calibration.shards > 1:
        raise CalibrationError(
            f"compensate of plan {plan.name!r} needs at least {least} tokens of calibration "
            f"text, in several samples and one shard, but has {tokens}: give more "
            "--samples and --shards 1, or leave it out"
        )
    width = next(d.layer.in_features for d in decisions if d.layer.block is not None)
    writers = [decision for decision in decisions if may_write(family, decision.layer, width)]
    if not any(decision.needs_inputs for decision in writers):
        raise PlanError(
            f"no matrix of plan {plan.name!r} is solved on calibration text and writes to hidden "
            "states, so compensate would change nothing: leave it out, or use gptq, spqr or a "
            "budget"
        )


def _asks_tokens(decision: Decision) -> bool:
    """Whether weights of tokens can change what is made of a layer."""
    schemes = decision.choices or ((decision.scheme,) if decision.scheme else ())
    compared = decision.objective == "hessian"
    return compared or any(scheme.solver.needs_inputs for scheme in schemes)


def check_links(family: Family, config: PretrainedConfig, spec: ActivationSpec) -> None:
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
    unmet = family.unmet_need(config)
    if unmet is not None:
        raise FamilyError(
            f"activations can be quantized {unmet}: leave out `activations` and `scheme`"
        )


def check_fixed(decisions: list[Decision], family: Family) -> None:
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


def check_tuned(decisions: list[Decision]) -> None:
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


def check_inputs(decisions: list[Decision], calibration: Calibration, plan: Plan) -> None:
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
        raise CalibrationError(
            f"{first.layer.name} is to be solved by {first.method}, which needs calibration "
            "samples: samples must be at least 1"
        )


def check_biases(decisions: list[Decision], model: PreTrainedModel) -> None:
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
