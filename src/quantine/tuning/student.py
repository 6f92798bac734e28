"""A quantized model whose numbers can be tuned, and the float model that it should agree with."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantine.calibrate.skeleton import fill, make_buffers, set_tensor, skeleton, weight_names
from quantine.core.qtensor import QTensor
from quantine.families.family import Family
from quantine.families.layers import Layer
from quantine.tuning.divergence import divergence
from quantine.tuning.matrix import TunedMatrix
from quantine.tuning.numbers import Numbers
from quantine.tuning.part import Part
from quantine.tuning.rounding import TunedGrid

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from quantine.source.checkpoint import Checkpoint


def float_model(
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    attention: str | None = None,
) -> PreTrainedModel:
    """The float model as a whole, in float32.

    Args:
        config: of the model.
        checkpoint: its float weights, which records what is read.
        device: where it computes.
        attention: see `quantine.calibrate.skeleton.skeleton`.

    Raises:
        CheckpointError: a tensor is not what was read before.
    """
    model = skeleton(config, attention)
    make_buffers(model, model, device)
    for path, child in model.named_children():
        fill(model, checkpoint.read(weight_names(child, path)), device)
    model.tie_weights()
    return model


class Student:
    """A quantized model whose numbers follow gradients of its divergence from the float model.

    Both models hold the matrices of their blocks in the dtype of products, so that these need not
    be rounded for every batch; all else is float32.

    Args:
        teacher: the float model in float32, whose matrices become ``dtype``. Their channels are in
            the order that those of the quantized ones have.
        model: becomes the quantized model: made by `sharing`, it rounds activations where the
            quantized model does.
        matrices: the quantized matrices.
        floats: every other float parameter of the quantized model by name, as files hold it.
        dtype: dtype in which matrices are multiplied, float32 or bfloat16.
        changed: names of the quantized matrices that are no rounded weights of the float model,
            because they make up for errors before them.

    Attributes:
        teacher: the float model.
        model: the quantized model.
        dtype: dtype in which matrices are multiplied.
        whole: all that is tuned.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        model: PreTrainedModel,
        matrices: Mapping[Layer, QTensor],
        floats: Mapping[str, Tensor],
        dtype: torch.dtype,
        changed: Collection[str] = (),
    ) -> None:
        self.dtype = dtype
        self._changed = changed
        stored = {layer.stored_name for layer in matrices}
        for name in {layer.stored_name for layer in matrices if layer.role == "block"}:
            set_tensor(teacher, name, teacher.get_parameter(name).to(dtype))
        self.teacher = teacher
        self.model = model
        vectors = {
            name: _numbers(model, name, value)
            for name, value in floats.items()
            if value.ndim == 1 and value.is_floating_point()
        }
        tuned = {layer: TunedMatrix(q) for layer, q in matrices.items()}
        self.whole = Part(self.model, tuned, vectors)
        for name, value in floats.items():
            set_tensor(model, name, value.float().clone())  # vectors are changed in place
        for name in stored:
            set_tensor(model, name, torch.empty_like(teacher.get_parameter(name)))
        self._tie(stored | set(floats))
        for parameter in self.whole.parameters():
            parameter.requires_grad_()
        self.whole.install()

    def block(self, index: int, family: Family) -> Part:
        """What is tuned of the block number ``index``."""
        inside = f"{family.blocks}.{index}."
        whole = self.whole
        matrices = {layer: m for layer, m in whole.matrices.items() if layer.block == index}
        vectors = {name: v for name, v in whole.vectors.items() if name.startswith(inside)}
        return Part(self.model, matrices, vectors)

    def free_codes(self, part: Part) -> None:
        """Let the codes of the matrices of ``part`` change, see `TunedMatrix.free_codes`."""
        for layer, matrix in part.matrices.items():
            weight = layer.part_of(self.teacher.get_parameter(layer.stored_name))
            matrix.free_codes(None if layer.name in self._changed else weight)

    @torch.no_grad()
    def divergence(self, segments: Tensor) -> float:
        """Mean divergence from the float model, in nats per token of ``segments`` ``[n, tokens]``.

        Only one segment runs at once.
        """
        total = 0.0
        for segment in segments.split(1):
            reference = self._logits(self.teacher, segment)
            total += divergence(reference, self._logits(self.model, segment))
        return total / segments.numel()

    def add_gradients(self, segments: Tensor, share: float) -> float:
        """Add ``share`` of the gradient of `divergence` to that of the model's parameters.

        Args:
            segments: ``[n, tokens]`` int64, which run at once.
            share: factor of the gradient.

        Returns:
            The divergence.
        """
        with torch.no_grad():
            reference = self._logits(self.teacher, segments)
        with torch.enable_grad():
            logits = self._logits(self.model, segments)
        gradient = torch.empty_like(logits)
        found = divergence(reference, logits.detach(), gradient, share / segments.numel())
        logits.backward(gradient)
        return found / segments.numel()

    def _tie(self, given: set[str]) -> None:
        """Let what the quantized model stores once be one parameter.

        Args:
            given: names of all tensors that it stores.
        """
        for name, source in self.model.all_tied_weights_keys.items():
            if name not in given:
                path, _, leaf = name.rpartition(".")
                shared = self.model.get_parameter(source)
                self.model.get_submodule(path)._parameters[leaf] = shared

    def _logits(self, model: PreTrainedModel, segments: Tensor) -> Tensor:
        """Logits ``[positions, vocabulary]`` of all positions of ``segments``."""
        rounds = self.dtype != torch.float32
        with torch.autocast(segments.device.type, self.dtype, enabled=rounds):
            logits: Tensor = model(input_ids=segments, use_cache=False).logits
        return logits.flatten(0, 1)


def _numbers(model: PreTrainedModel, name: str, value: Tensor) -> Numbers:
    """The numbers of the vector ``name`` of ``model``, which begin as ``value``."""
    path, _, leaf = name.rpartition(".")
    if isinstance(model.get_submodule(path), TunedGrid):
        return TunedGrid.numbers(leaf, value)
    return Numbers.vector(value)


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` that has the same tensors, not copies of them."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)
