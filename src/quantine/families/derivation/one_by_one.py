"""A proof on a small model that its blocks can run one by one, as a calibration runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantine.errors import FamilyError, cut
from quantine.families.base import base_of
from quantine.families.buffers import compute_buffers
from quantine.families.derivation.small import own_generators
from quantine.families.family import Family
from quantine.families.layers import block_list
from quantine.families.stand_in import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block beside its hidden states, by place and by name."""


@dataclass(frozen=True)
class BlockCall:
    """One call of one block.

    Attributes:
        block: the block.
        hidden: hidden states ``[batch, tokens, width]`` that enter it.
        arguments: its other arguments.
    """

    block: nn.Module
    hidden: Tensor
    arguments: Call

    def output(self) -> Tensor:
        """The hidden states that the block puts out now, of the shape of `hidden`."""
        args, kwargs = self.arguments
        return _hidden(self.block(self.hidden.clone(), *args, **kwargs))


def run(model: nn.Module, tokens: Tensor) -> Any:
    """What ``model`` puts out for ``tokens`` ``[batch, tokens]``, as in a calibration.

    Raises:
        FamilyError: it fails.
    """
    try:
        return model(input_ids=tokens, use_cache=False, output_attentions=False)
    except Exception as error:  # whatever an architecture raises that needs more than text
        raise FamilyError(f"a small model fails on text: {cut(repr(error), 120)}") from error


def check_blocks(model: PreTrainedModel, family: Family, one: Tensor, other: Tensor) -> None:
    """Check that a block needs of a text only what the block before it puts out.

    What else the model gives to its blocks has to be the same for every text of a length.

    Args:
        model: a small model with random weights.
        family: its architecture.
        one: tokens ``[batch, tokens]`` that run through the blocks.
        other: tokens of the same shape, with which the model says what else it gives to its blocks.

    Raises:
        FamilyError: a block, run alone, puts out something else than in the whole model.
    """
    blocks, expected = block_list(model, family), []
    handles = [
        block.register_forward_hook(lambda _, __, output: expected.append(_hidden(output).clone()))
        for block in blocks
    ]
    try:
        run(base_of(model, family)[1], one)
    finally:
        for handle in handles:
            handle.remove()
    hidden = _calls(model, family, one)[0]
    calls = _calls(model, family, other)[1]
    for index, (block, (args, kwargs)) in enumerate(zip(blocks, calls, strict=True)):
        try:
            hidden = _hidden(block(hidden, *args, **kwargs))
        except Exception as error:  # whatever is raised for want of what another block computes
            raise FamilyError(
                f"{family.blocks}.{index} does not run alone: {cut(repr(error), 120)}"
            ) from error
        if not torch.allclose(hidden, expected[index], rtol=1e-5, atol=1e-6):
            raise FamilyError(
                f"{family.blocks}.{index} reads more of a text than the outputs of the block before"
            )


def block_calls(model: PreTrainedModel, family: Family, tokens: Tensor) -> list[BlockCall]:
    """How the model calls each block for ``tokens`` ``[batch, tokens]``.

    Its blocks can run one by one, see `check_blocks`.
    """
    hidden, arguments = _calls(model, family, tokens)
    calls = []
    for block, one in zip(block_list(model, family), arguments, strict=True):
        calls.append(BlockCall(block, hidden, one))
        hidden = calls[-1].output()
    return calls


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _calls(model: PreTrainedModel, family: Family, tokens: Tensor) -> tuple[Tensor, list[Call]]:
    """The hidden states that enter the first block, and how the model calls each."""
    blocks = block_list(model, family)
    originals = list(blocks)
    recorders = [StandIn(block, family.outputs) for block in originals]
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        run(base_of(model, family)[1], tokens)
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    entered = recorders[0].entered().clone()
    return entered, [(recorder.args, recorder.kwargs) for recorder in recorders]


def check_buffers(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Check that the model's initializer computes every buffer that no file holds.

    Weights of modules with such buffers, and around them, may be others afterwards.

    Args:
        model: a small model.
        paths: paths of the modules that a text needs.

    Raises:
        FamilyError: it leaves one as it was.
    """
    stored = set(model.state_dict())
    for path in dict.fromkeys(paths):
        module = model.get_submodule(path)
        names = [name for name, _ in module.named_buffers(recurse=False)]
        names = [name for name in names if f"{path}.{name}".lstrip(".") not in stored]
        before = {name: module.get_buffer(name) for name in names}
        if names:
            with own_generators():
                compute_buffers(model, module, before)
        for name, buffer in before.items():
            if not torch.equal(module.get_buffer(name), buffer):
                raise FamilyError(f"its initializer does not compute {path}.{name}")
