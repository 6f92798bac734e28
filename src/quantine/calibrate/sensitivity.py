"""How much a model's predictions change when the output of one of its matrices does.

For a small change ``dy`` of an output, the Kullback-Leibler divergence between the model's
predictions before and after is about ``(g @ dy)**2 / 2``, with ``g`` the gradient of the
log-likelihood of a token drawn from the prediction (the Fisher information). With changes of
different outputs taken as independent, output ``r`` counts with the mean of ``g[r]**2``.

Gradients are computed block by block, from the last to the first, from the inputs of every block:
the memory is that of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from quantine.calibrate.activations import Activations
from quantine.calibrate.sequential import Sequential, StandIn, drop_weights, set_tensor
from quantine.families.base import Family, block_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS: Final = 2**23
"""Logits that are held at once."""


def replace_by_gradients(
    model: PreTrainedModel,
    family: Family,
    read: Callable[[str], Tensor],
    hidden: Activations,
    seed: int,
    bfloat16: bool = False,
) -> int:
    """Turn the last block's outputs into gradients of a drawn token's log-likelihood.

    Args:
        model: a `quantine.calibrate.sequential.skeleton`.
        read: the float tensor of a name outside of blocks.
        hidden: outputs of the last block, replaced in place.
        seed: of the local generator that draws tokens.
        bfloat16: multiply matrices in bfloat16.

    Returns:
        The number of tokens.
    """
    inside = f"{family.blocks}."
    for name in [name for name in model.state_dict() if not name.startswith(inside)]:
        value = read(name)
        rounds = bfloat16 and value.ndim >= 2
        set_tensor(model, name, value.bfloat16() if rounds else value.float())
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    for batch in range(len(hidden)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            hidden[batch] = _gradients(model, family, hidden[batch], generator)
        tokens += hidden[batch].shape[0] * hidden[batch].shape[1]
    drop_weights(model)
    return tokens


def _gradients(
    model: PreTrainedModel, family: Family, hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """Of every token of ``hidden`` ``[batch, tokens, width]``; some at once, by their logits."""
    width = max(1, LOGITS // model.config.vocab_size)
    segments = []
    for segment in hidden.split(1):
        parts = [_gradient(model, family, part, generator) for part in segment.split(width, 1)]
        segments.append(torch.cat(parts, 1))
    return torch.cat(segments)


def _gradient(
    model: PreTrainedModel, family: Family, hidden: Tensor, generator: torch.Generator
) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    with _replayed(model, family, leaf), torch.enable_grad():
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)  # only their shape matters
        logits = model(input_ids=ids, use_cache=False, output_attentions=False).logits[0]
    # The gradient of a drawn token's cross entropy in the logits: probabilities, less one there.
    probabilities = logits.detach().float().softmax(-1)
    drawn = draw(probabilities, generator)
    probabilities.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
    logits.backward(probabilities.to(logits.dtype))
    assert leaf.grad is not None
    return leaf.grad


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index for each row of ``probabilities`` ``[rows, n]`` float32, ``[rows, 1]`` int64.

    One random number a row, where `torch.multinomial` takes one for each probability.
    """
    sums = probabilities.cumsum(-1)
    places = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True).clamp_(max=sums.shape[1] - 1)


@contextmanager
def _replayed(model: PreTrainedModel, family: Family, hidden: Tensor) -> Iterator[None]:
    """Let every block of ``model`` put out ``hidden``."""
    blocks = block_list(model, family)
    originals = list(blocks)
    try:
        for index, block in enumerate(originals):
            blocks[index] = StandIn(block, family.returns_tuple, hidden)
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


def backward(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    paths: list[str],
    inputs: Activations,
    gradients: Activations,
) -> dict[str, Tensor]:
    """Take gradients back through a block, and add up those of its matrices' outputs.

    Args:
        block: block ``index`` with its weights.
        paths: the matrices looked at, relative to the block.
        inputs: of the block.
        gradients: of its outputs; replaced by those of its inputs.

    Returns:
        For each path the sum over tokens of squared gradients, ``[out]`` float32.
    """
    sums: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, object, Tensor], None]:
        def add(gradient: Tensor) -> None:
            squares = gradient.float().square().flatten(0, -2).sum(0)
            sums[path] = sums[path] + squares if path in sums else squares

        def look(_: nn.Module, inputs: object, output: Tensor) -> None:
            output.register_hook(add)

        return look

    handles = [block.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    try:
        for batch in range(len(inputs)):
            leaf = inputs[batch].clone().requires_grad_()
            with torch.enable_grad():
                sequential.run(index, leaf).backward(gradients[batch])
            assert leaf.grad is not None
            gradients[batch] = leaf.grad
    finally:
        for handle in handles:
            handle.remove()
    return sums
