"""Gradients of a model's predictions with respect to the outputs of its matrices.

`quantine.statistics.gradients` says what they are used for.

Gradients are computed block by block, from the last to the first. Each block is run again on its
stored inputs, so that memory holds the weights of one block only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import torch
from torch import Tensor

from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.hidden_states import HiddenStates
from quantine.calibrate.sequential import Sequential
from quantine.calibrate.setup import CalibrationSetup
from quantine.calibrate.skeleton import drop_weights, set_tensor
from quantine.core.process_memory import return_freed_memory
from quantine.families.family import Family
from quantine.families.layers import Layer, block_list
from quantine.families.stand_in import standing_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Statistic(Protocol):
    """What is made of the gradients with respect to a matrix's outputs."""

    def update(self, gradient: Tensor) -> None:
        """Add the gradients ``[..., out]`` of some tokens."""
        ...


SomeStatistic = TypeVar("SomeStatistic", bound=Statistic)
"""The type of the statistics that `backward` makes."""
LOGITS: Final = 2**23
"""Number of logits (tokens times vocabulary) that are computed at once, to bound memory."""


def there_and_back(
    setup: CalibrationSetup,
    loader: BlockLoader,
    layers: Sequence[Layer],
    statistic: Callable[[], SomeStatistic],
    read: Callable[[str], Tensor],
    scratch: Path,
    seed: int,
    note: Callable[[str], None],
    forward: Callable[[int, Sequential], None] = lambda *_: None,
) -> Iterator[tuple[int, dict[str, SomeStatistic]]]:
    """Run segments through all blocks of the float model, and gradients of the loss back.

    Args:
        setup: the segments and the model.
        loader: gives the blocks their weights.
        layers: the matrices of blocks whose outputs' gradients are wanted.
        statistic: makes an empty statistic of the gradients of a matrix.
        read: reads the float tensor that the model calls by a name.
        scratch: directory for the inputs of all blocks.
        seed: seed of the generator that draws tokens from the predictions.
        note: receives lines about the progress.
        forward: called on the way forward at each block, which is loaded, before it is passed.

    Yields:
        From the last block to the first, its number and the statistics by name of the layer.
    """
    sequential = Sequential(setup)
    blocks = range(len(block_list(setup.model, setup.family)))
    inputs: list[HiddenStates] = []
    for index in blocks:
        note(f"block {index + 1}/{len(blocks)} forward")
        with setup.times.stage("reading"):
            loader.load(index, then=min(index + 1, blocks[-1]))
        with setup.times.stage("hidden states"):
            inputs.append(sequential.hidden.copied(scratch / f"inputs-{index}"))
        forward(index, sequential)
        sequential.advance(index)
        loader.release(index)
        return_freed_memory()
    gradients = sequential.hidden
    with setup.times.stage("gradients"):
        replace_by_gradients(setup, read, gradients, seed)
    for index in reversed(blocks):
        note(f"block {index + 1}/{len(blocks)} backward")
        with setup.times.stage("reading"):
            loader.load(index, then=index - 1 if index else None)
        inside = [layer for layer in layers if layer.block == index]
        with setup.times.stage("gradients"):
            found = backward(sequential, index, inside, inputs[index], gradients, statistic)
        yield index, found
        loader.release(index)
        return_freed_memory()


def replace_by_gradients(
    setup: CalibrationSetup, read: Callable[[str], Tensor], hidden: HiddenStates, seed: int
) -> None:
    """Replace the last block's outputs by the gradients of the loss with respect to them.

    The loss of each position is the cross entropy of a token drawn from the model's own prediction,
    as the Fisher information asks for.

    Args:
        setup: the model, its device and dtypes.
        read: gives the float tensor of a name, for names outside of blocks.
        hidden: outputs of the last block, ``[batch, tokens, width]`` float32 for each batch,
            replaced in place by gradients of the same shape.
        seed: seed of the local generator that draws tokens.
    """
    model, inside = setup.model, f"{setup.family.blocks}."
    for name in [name for name in model.state_dict() if not name.startswith(inside)]:
        value = read(name).to(setup.device)
        rounds = setup.bfloat16 and value.ndim >= 2
        set_tensor(model, name, value.bfloat16() if rounds else value.float())
    generator = torch.Generator("cpu").manual_seed(seed)
    for batch in range(len(hidden)):
        with setup.autocast():
            hidden[batch] = _gradients(model, setup.family, hidden[batch], generator)
    drop_weights(model)


def _gradients(
    model: PreTrainedModel, family: Family, hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """The gradients of all positions of ``hidden`` ``[batch, tokens, width]``, in its shape.

    Positions are taken a few at once, so that at most about `LOGITS` logits are in memory.
    """
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
    blocks = block_list(model, family)
    with standing_in(blocks, family.outputs, leaf), torch.enable_grad():
        ids = hidden.new_zeros(hidden.shape[:2], dtype=torch.int64)  # only their shape matters
        logits = model(input_ids=ids, use_cache=False, output_attentions=False).logits[0]
    # The gradient of a drawn token's cross entropy in the logits: probabilities, less one there.
    probabilities = logits.detach().float().softmax(-1)
    # Drawn on the CPU: GPUs do not sum floats along a row in the same order every time.
    drawn = draw(probabilities.cpu(), generator).to(probabilities.device)
    probabilities.scatter_add_(1, drawn, probabilities.new_full(drawn.shape, -1.0))
    logits.backward(probabilities.to(logits.dtype))
    assert leaf.grad is not None
    return leaf.grad


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index for each row with the probabilities of that row.

    Takes one random number for each row, where `torch.multinomial` takes one for each probability.

    Args:
        probabilities: ``[rows, n]`` float32.
        generator: on the device of ``probabilities``.

    Returns:
        ``[rows, 1]`` int64.
    """
    sums = probabilities.cumsum(-1)
    places = (
        torch.rand(len(sums), 1, generator=generator, dtype=torch.float32, device=sums.device)
        * sums[:, -1:]
    )
    return torch.searchsorted(sums, places, right=True).clamp_(max=sums.shape[1] - 1)


def backward(
    sequential: Sequential,
    index: int,
    layers: Sequence[Layer],
    inputs: HiddenStates,
    gradients: HiddenStates,
    statistic: Callable[[], SomeStatistic],
) -> dict[str, SomeStatistic]:
    """Backpropagate through a block, and make a statistic of its matrices' outputs' gradients.

    Args:
        sequential: runs the block.
        index: number of the block, whose weights are loaded.
        layers: the matrices of the block whose gradients are wanted.
        inputs: inputs of the block, ``[batch, tokens, width]`` float32 for each batch.
        gradients: gradients with respect to the block's outputs, in the same shape; replaced in
            place by those with respect to its inputs.
        statistic: makes an empty statistic; each is given the gradients batch after batch.

    Returns:
        The statistics by name of the layer.
    """
    found = {layer.name: statistic() for layer in layers}
    model = sequential.setup.model

    def watch(name: str) -> Callable[[Tensor], None]:
        def look(output: Tensor) -> None:
            output.register_hook(found[name].update)

        return look

    handles = [layer.observe_outputs(model, watch(layer.name)) for layer in layers]
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
    return found
