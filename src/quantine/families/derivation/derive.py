"""Finding the family of an architecture: its blocks, matrices that share an input, its tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from quantine.errors import FamilyError, cut
from quantine.families.derivation.expert_groups import (
    check_experts,
    counts_of_experts,
    with_all_experts,
)
from quantine.families.derivation.matrices import groups_of, kept_in
from quantine.families.derivation.one_by_one import check_blocks, check_buffers, run
from quantine.families.derivation.small import bare_model, randomize, small_model
from quantine.families.derivation.trace import Trace, is_matrix, traced
from quantine.families.experts import experts_in
from quantine.families.family import Family
from quantine.families.layers import are_tied

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SHAPE: Final = (2, 24)
"""Number of sequences, and of tokens of each, that run through a small model."""
TOKENS: Final = (5, 200)
"""The first of these tokens, and the one after the last; none of them is special."""


@dataclass(frozen=True)
class Study:
    """A small random model, and what was found out about it.

    Attributes:
        model: the model, each of whose experts is a module.
        family: its architecture, without links.
        trace: of one forward pass of it.
        tokens: two texts for it, ``[batch, tokens]`` each; the first is that of the trace.
    """

    model: PreTrainedModel
    family: Family
    trace: Trace
    tokens: tuple[Tensor, Tensor]


def derive(config: PretrainedConfig) -> Family:
    """The family of a model, see `study`."""
    return study(config).family


def study(config: PretrainedConfig) -> Study:
    """Find the family of a model by running a small random model of its class.

    What that does with its parameters is recorded: which matrices read the same tensor, and in
    which order. Then its blocks run one by one, as in a calibration, and have to put out the same.

    Args:
        config: the model's configuration in transformers, which is not changed.

    Raises:
        FamilyError: the architecture is not understood; the message says what of it.
    """
    try:
        with torch.no_grad(), torch.device("cpu"):
            return _studied(small_model(config), bare_model(config))
    except FamilyError as error:
        raise FamilyError(f"{config.model_type} models are not understood: {error}") from error


def _studied(model: PreTrainedModel, whole: PreTrainedModel) -> Study:
    randomize(model)
    tokens = (_tokens(0), _tokens(1))
    check_experts(model, tokens[0])
    with traced(model) as trace:
        run(model, tokens[0])
    family = _family(model, trace, whole)
    check_blocks(model, family, *tokens)
    check_buffers(model, trace.calls)
    randomize(model)  # the initializer may have changed weights
    return Study(model, family, trace, tokens)


def _tokens(seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(*TOKENS, SHAPE, generator=generator, dtype=torch.int64, device="cpu")


def _family(model: PreTrainedModel, trace: Trace, whole: PreTrainedModel) -> Family:
    """What a trace of a small model tells of the ``whole`` one, whose weights are not looked at.

    Raises:
        FamilyError: it does not fit into what a family can say.
    """
    kind: str = model.config.model_type
    path = _blocks(model, trace)
    blocks = list(model.get_submodule(path).children())
    counts = counts_of_experts(whole)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    kept: dict[str, str] = {}
    for index, block in enumerate(blocks):
        kept.update(kept_in(block, f"{path}.{index}", trace, shapes))
    groups = tuple(
        with_all_experts(
            groups_of(f"{path}.{index}", kept, trace), block, f"{path}.{index}", counts
        )
        for index, block in enumerate(blocks)
    )
    if not any(groups):
        raise FamilyError(f"no block in {path} has a matrix that can be quantized")
    table = _place(model, model.get_input_embeddings(), "token embedding")
    head = _place(model, model.get_output_embeddings(), "output head")
    if are_tied(model, table, head) and not getattr(model.config, "tie_word_embeddings", True):
        raise FamilyError(f"{head} and {table} share a table although tie_word_embeddings is false")
    return Family(
        name=kind,
        model_types=(kind,),
        blocks=path,
        groups=next(found for found in groups if found),
        embedding=table,
        head=head,
        outputs=trace.outputs[f"{path}.0"],
        block_groups=groups,
        kept=tuple(sorted(kept.items())),
        fixed=tuple(sorted(_fixed((table, head), trace).items())),
        experts=tuple(sorted({inside for block in blocks for inside in experts_in(block)})),
    )


def _blocks(model: PreTrainedModel, trace: Trace) -> str:
    """Path of the one list with matrices in every entry, each of which ran once, in order.

    Raises:
        FamilyError: there is none, or there are several; or blocks share parameters.
    """
    ran = set(trace.calls)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(f"{name}.{index}" in ran for index in range(len(module)))
        and not is_matrix(module[0])
        and any(is_matrix(part) for part in module.modules())
    ]
    outer = [name for name in lists if not any(name.startswith(f"{one}.") for one in lists)]
    if len(outer) != 1:
        found = f" but in {cut(', '.join(outer), 240)}" if outer else ""
        raise FamilyError(f"blocks do not stand in one ModuleList{found}")
    path: str = outer[0]
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    entries = {f"{path}.{index}": index for index in range(len(blocks))}
    order = [entries[name] for name in trace.calls if name in entries]
    if order != list(range(len(blocks))):
        raise FamilyError(
            f"the {len(blocks)} blocks in {path} run in the order {cut(str(order), 60)}"
        )
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise FamilyError(f"{path}.{index}.{name} is shared with another block")
    return path


def _place(model: PreTrainedModel, module: Any, what: str) -> str:
    """Path of a module that transformers says a model has."""
    found: str = next((name for name, one in model.named_modules() if one is module), "")
    if not found:
        raise FamilyError(f"transformers knows no {what} of it")
    return found


def _fixed(paths: tuple[str, str], trace: Trace) -> dict[str, str]:
    """Why the embedding or the head at ``paths`` cannot be quantized, where they cannot."""
    found = {}
    for path in paths:
        uses = trace.uses.get(f"{path}.weight", set())
        if path in trace.unlike:
            found[path] = "it does not compute what its class says"
        elif uses:
            found[path] = f"its weight is read elsewhere, too ({cut(', '.join(sorted(uses)), 60)})"
    return found
