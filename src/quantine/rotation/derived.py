"""Wirings of models that nobody has described: found on a small random model, and proved there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from quantine.activations.linked import KEY_HEADS
from quantine.activations.proof import Proof
from quantine.core.ambient import own_state
from quantine.core.device import CPU
from quantine.core.transform_spec import ROTATE
from quantine.errors import FamilyError
from quantine.families.derivation.derive import Study, study
from quantine.families.derivation.links import Reading, hidden_links, readings_of, value_links
from quantine.families.derivation.one_by_one import block_calls
from quantine.families.derivation.small import bare_model
from quantine.families.derivation.trace import is_matrix
from quantine.families.experts import experts_in
from quantine.families.family import Family, Link
from quantine.families.heads import Heads
from quantine.families.layers import is_transposed
from quantine.rotation.norms import norm_kind
from quantine.rotation.proved import prove
from quantine.rotation.rotated import rotated
from quantine.rotation.wiring import VALUES, BlockWiring, Wiring

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@own_state()
def derived_wiring(config: PretrainedConfig) -> Wiring:
    """Find what reads and writes the hidden states of a model, and prove it on a small one.

    Matrices that read what a norm of hidden states puts out are readers; others of its block with
    as many outputs as there are channels are writers. Values are those whose reorder is proved.
    All else stays. Rotated in this way the small model has to compute the same, and something else
    where one matrix is left out.

    Args:
        config: the model's configuration in transformers, where table and head are two; it is not
            changed.

    Raises:
        FamilyError: the model is not understood, or does not compute the same.
    """
    try:
        studied = study(config)
    except FamilyError as error:
        raise FamilyError(f"{error}: leave out `{ROTATE}`") from error
    shake_buffers(studied.model)
    finder = _Finder(studied, bare_model(config))
    family, values = finder.values()
    wiring = Wiring(
        family,
        tuple(finder.block(index, link) for index, link in enumerate(values)),
        finder.tables(),
        finder.final_norm(),
    )
    made = rotated(studied.model, wiring, seed=0)
    names = {name for name, _ in studied.model.named_parameters()}
    wiring = replace(wiring, untouched=frozenset(names - set(made.recipes)))
    prove(studied, wiring, made)
    return wiring


def shake_buffers(model: PreTrainedModel) -> None:
    """Change every number of the buffers that files hold, so that none is equal to another.

    Such a buffer may scale or shift hidden states like a parameter, which an initial 1 or 0 hides.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    stored = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float32, device=CPU)
            buffer.add_(0.1 + noise.to(buffer.dtype))


class _Finder:
    """Finds the parts of the wiring of a studied model, none of which is proved.

    Args:
        studied: the small model.
        whole: that which it stands for, whose sizes tell apart what is equally wide by chance.
    """

    def __init__(self, studied: Study, whole: PreTrainedModel) -> None:
        self._model, self._family, self._trace = studied.model, studied.family, studied.trace
        self._calls = block_calls(studied.model, studied.family, studied.tokens[0])
        self._width = self._calls[0].hidden.shape[-1]
        self._shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}

    def values(self) -> tuple[Family, list[Link | None]]:
        """The family with its number of heads of keys, and the reorder of values of each block."""
        found = []
        for field in KEY_HEADS:
            family = replace(self._family, key_heads=field)
            heads = Heads.of(self._model.config, family)
            found = [self._values_of(index, heads) for index in range(len(self._calls))]
            if any(found):
                break
        return family, found

    def _values_of(self, index: int, heads: Heads) -> Link | None:
        """The reorder of the values of block number ``index``, if one is proved.

        Channels that can be reordered across heads, as those of an MLP, are none.
        """
        readings = self._readings(index)
        proof = Proof(self._calls[index], heads, 0)
        for number, reading in enumerate(readings):
            if reading.width % heads.queries == 0:
                links = [*hidden_links(readings, number), *value_links(readings, number, heads)]
                link = next(filter(proof.holds, links), None)
                if link is not None and link.kind == VALUES:
                    return link
        return None

    def block(self, index: int, values: Link | None) -> BlockWiring:
        """The wiring of block number ``index``.

        Raises:
            FamilyError: no matrix of it reads what a norm of hidden states puts out.
        """
        readers: dict[str, list[str]] = {}
        others: list[tuple[str, int]] = []
        for reading in self._readings(index):
            if self._is_hidden_norm(index, reading):
                readers.setdefault(reading.writer, []).extend(reading.paths)
            else:
                others.extend(zip(reading.paths, reading.outputs, strict=True))
        self._add_experts(index, readers)
        if not readers:
            first = others[0][0] if others else ""
            raise FamilyError(
                f"{self._prefix(index)}.{first} reads hidden states that no norm before it has "
                f"made alike: leave out `{ROTATE}`"
            )
        writers = tuple(
            path
            for path, outputs in others
            if outputs == self._width and self._writes(f"{self._prefix(index)}.{path}")
        )
        return BlockWiring(
            tuple((norm, tuple(paths)) for norm, paths in readers.items()), writers, values
        )

    def _writes(self, path: str) -> bool:
        """Whether the matrix at ``path`` of the whole model has outputs for all channels."""
        axis = 1 if is_transposed(self._model.get_submodule(path)) else 0
        _, width = self._shapes[f"{self._family.embedding}.weight"]
        return self._shapes[f"{path}.weight"][axis] == width

    def tables(self) -> tuple[str, ...]:
        """Paths of the tables outside of blocks whose rows are as wide as hidden states."""
        inside = f"{self._family.blocks}."
        return tuple(
            path
            for path, module in self._model.named_modules()
            if isinstance(module, nn.Embedding)
            and module.embedding_dim == self._width
            and path in self._trace.calls
            and not path.startswith(inside)
        )

    def final_norm(self) -> str:
        """Path of the one norm of hidden states that runs behind the blocks.

        Raises:
            FamilyError: there is none, or another number.
        """
        calls, inside = self._trace.calls, f"{self._family.blocks}."
        last = max(n for n, path in enumerate(calls) if path.startswith(inside))
        found = [path for path in calls[last + 1 :] if self._is_norm(path)]
        if len(found) != 1:
            raise FamilyError(
                f"{len(found)} norms run between blocks and head of {self._family.name} models, "
                f"not 1: leave out `{ROTATE}`"
            )
        return found[0]

    def _readings(self, index: int) -> list[Reading]:
        """What the matrices of a block read, those that stay in 16 bit included."""
        return readings_of(self._calls[index].block, self._prefix(index), {}, self._trace)

    def _prefix(self, index: int) -> str:
        return f"{self._family.blocks}.{index}"

    def _is_hidden_norm(self, index: int, reading: Reading) -> bool:
        return (
            bool(reading.writer)
            and reading.width == self._width
            and self._is_norm(f"{self._prefix(index)}.{reading.writer}")
        )

    def _is_norm(self, path: str) -> bool:
        """Whether the module at ``path`` is a norm as wide as hidden states.

        Raises:
            FamilyError: it has a weight for each channel like a norm, but is none.
        """
        module = self._model.get_submodule(path)
        if any(module.children()) or is_matrix(module):
            return False
        weight = getattr(module, "weight", None)
        if weight is not None and weight.shape != (self._width,):
            return False
        try:
            norm_kind(module, path, self._width)
        except FamilyError:
            if weight is not None:
                raise
            return False
        return True

    def _add_experts(self, index: int, readers: dict[str, list[str]]) -> None:
        """Add experts, and what chooses and weighs them, to what the norm before them feeds."""
        prefix, block = self._prefix(index), self._calls[index].block
        for path in experts_in(block):
            before = self._trace.calls[: self._trace.calls.index(f"{prefix}.{path}")]
            inside = [one for one in before if one.startswith(f"{prefix}.")]
            norm = next((one for one in reversed(inside) if self._is_norm(one)), None)
            if norm is None:
                raise FamilyError(f"no norm stands before {prefix}.{path}: leave out `{ROTATE}`")
            fed = readers.setdefault(norm.removeprefix(f"{prefix}."), [])
            known = {one for paths in readers.values() for one in paths}
            fed.extend(one for one in self._routers(index) if one not in known)
            fed.append(path)

    def _routers(self, index: int) -> list[str]:
        """Paths of the modules of a block whose weight chooses or weighs experts."""
        inside = dict(self._calls[index].block.named_parameters())
        return [
            path.removesuffix(".weight")
            for path, why in self._family.kept
            if path.endswith(".weight") and why.endswith("experts")
            if path in inside and inside[path].shape[-1] == self._width
        ]
