"""A quantized model whose numbers can be tuned, and the float model that it should agree with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantine.calibrate.skeleton import fill, make_buffers, set_tensor, skeleton, weight_names
from quantine.core.qtensor import QTensor
from quantine.families.layers import Layer
from quantine.tuning.divergence import divergence
from quantine.tuning.numbers import Numbers, TunedMatrix

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from quantine.source.checkpoint import Checkpoint


def float_model(
    config: PretrainedConfig, checkpoint: Checkpoint, device: torch.device
) -> PreTrainedModel:
    """The float model as a whole, in float32.

    Args:
        config: of the model.
        checkpoint: its float weights, which records what is read.
        device: where it computes.

    Raises:
        CheckpointError: a tensor is not what was read before.
    """
    model = skeleton(config)
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
        teacher: the float model in float32, whose matrices become ``dtype``.
        matrices: the quantized matrices.
        floats: every other float tensor of the quantized model by name, as files hold it.
        dtype: dtype in which matrices are multiplied, float32 or bfloat16.

    Attributes:
        matrices: the numbers of the quantized matrices.
        vectors: norms and biases, by name.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        matrices: Mapping[Layer, QTensor],
        floats: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._dtype = dtype
        inside = {layer.stored_name for layer in matrices if layer.role == "block"}
        for name in inside:
            set_tensor(teacher, name, teacher.get_parameter(name).to(dtype))
        self._teacher = teacher
        self._model = _sharing(teacher)
        self.matrices = {layer: TunedMatrix(q) for layer, q in matrices.items()}
        self.vectors = {
            name: Numbers.vector(value)
            for name, value in floats.items()
            if value.ndim == 1 and value.is_floating_point()
        }
        for name, value in floats.items():
            set_tensor(self._model, name, value.float().clone())  # vectors are changed in place
        for name in {layer.stored_name for layer in self.matrices}:
            set_tensor(self._model, name, self._model.get_parameter(name).detach().clone())
        self._tie({layer.stored_name for layer in matrices} | set(floats))
        for parameter in self._tuned():
            parameter.requires_grad_()
        self.install()

    def leaves(self) -> Iterator[Numbers]:
        """All numbers that are tuned, in an order that does not change."""
        for matrix in self.matrices.values():
            yield from matrix.numbers.values()
        yield from self.vectors.values()

    @torch.no_grad()
    def install(self) -> None:
        """Let the model compute with the numbers as they are now."""
        for layer, matrix in self.matrices.items():
            parameter = self._model.get_parameter(layer.stored_name)
            layer.part_of(parameter).copy_(matrix.weight())
        for name, numbers in self.vectors.items():
            self._model.get_parameter(name).copy_(numbers.now())

    @torch.no_grad()
    def divergence(self, segments: Tensor) -> float:
        """Mean divergence from the float model, in nats per token of ``segments`` ``[n, tokens]``.

        Only one segment runs at once.
        """
        total = 0.0
        for segment in segments.split(1):
            reference = self._logits(self._teacher, segment)
            total += divergence(reference, self._logits(self._model, segment))
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
            reference = self._logits(self._teacher, segments)
        with torch.enable_grad():
            logits = self._logits(self._model, segments)
        gradient = torch.empty_like(logits)
        found = divergence(reference, logits.detach(), gradient, share / segments.numel())
        logits.backward(gradient)
        return found / segments.numel()

    def pass_gradients(self) -> None:
        """Hand the gradients of the model's parameters on to `leaves`, and clear them."""
        for layer, matrix in self.matrices.items():
            gradient = self._model.get_parameter(layer.stored_name).grad
            if gradient is not None:
                with torch.enable_grad():
                    matrix.weight().backward(layer.part_of(gradient).float())
        for name, numbers in self.vectors.items():
            gradient = self._model.get_parameter(name).grad
            if gradient is not None:
                with torch.enable_grad():
                    numbers.now().backward(gradient)
        for parameter in self._tuned():
            parameter.grad = None

    def _tie(self, given: set[str]) -> None:
        """Let what the quantized model stores once be one parameter.

        Args:
            given: names of all tensors that it stores.
        """
        for name, source in self._model.all_tied_weights_keys.items():
            if name not in given:
                path, _, leaf = name.rpartition(".")
                shared = self._model.get_parameter(source)
                self._model.get_submodule(path)._parameters[leaf] = shared

    def _tuned(self) -> list[nn.Parameter]:
        names = {layer.stored_name for layer in self.matrices} | set(self.vectors)
        return [self._model.get_parameter(name) for name in sorted(names)]

    def _logits(self, model: PreTrainedModel, segments: Tensor) -> Tensor:
        """Logits ``[positions, vocabulary]`` of all positions of ``segments``."""
        rounds = self._dtype != torch.float32
        with torch.autocast(segments.device.type, self._dtype, enabled=rounds):
            logits: Tensor = model(input_ids=segments, use_cache=False).logits
        return logits.flatten(0, 1)


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind that has the tensors of ``model``."""
    other = skeleton(model.config)
    for own, given in zip(other.modules(), model.modules(), strict=True):
        own._parameters.update(given._parameters)
        own._buffers.update(given._buffers)
    return other
