"""The matrices of a model that a plan can quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from quantine.errors import FamilyError
from quantine.families.experts import Experts
from quantine.families.family import Family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.hooks import RemovableHandle

Role = Literal["block", "embedding", "head"]
"""Place of a matrix: inside a decoder block, token embedding, or output head."""


INPUTS_NAME: Final = "inputs"
"""Name of the submodule that rounds the input of a matrix's module, where activations are
quantized."""


@dataclass(frozen=True)
class Layer:
    """One matrix that a plan can quantize, and access to it in a model.

    What quantizes the matrix reads, replaces and observes it through `read`, `write`, `observe` and
    `observe_outputs`. So it need not be the whole weight of a module: it may be one of several in a
    parameter of more dimensions, or some rows of a fused one. Reorders along a family's links
    rewrite whole modules, matrices that no plan names included.

    Attributes:
        name: name in plans: the full path of its module, if it is the module's whole weight.
        out_features, in_features: its shape ``[out, in]``; an embedding is ``[rows, width]``.
        role: whether it is inside a decoder block, the token embedding, or the output head.
        block: number of its block, from 0; ``None`` outside of blocks.
        group: number of its group in ``Family.groups_in(block)``; ``None`` outside of blocks.
        transposed: whether it is stored as ``[in, out]`` (GPT-2's Conv1D).
        module: full path of the module that has the parameter and gets the input; empty if that is
            ``name``.
        parameter: name of the parameter in that module.
        index: place of the matrix in the first dimensions of a parameter that holds several; empty
            if the parameter has two dimensions.
        rows: first output of the matrix, and the one after its last, in a fused parameter; ``None``
            if it has all.
        experts: full path of the module of experts that the matrix is in; empty if it is in none.
    """

    name: str
    out_features: int
    in_features: int
    role: Role
    block: int | None = None
    group: int | None = None
    transposed: bool = False
    module: str = ""
    parameter: str = "weight"
    index: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    experts: str = ""

    @property
    def weights(self) -> int:
        """Number of weights of the matrix."""
        return self.out_features * self.in_features

    @property
    def stage(self) -> tuple[str, str]:
        """Equal for matrices of several experts that run side by side; unlike for all others."""
        return (self.experts, self.name.rpartition(".")[2] if self.experts else self.name)

    @property
    def stored_name(self) -> str:
        """Full name of the parameter that holds the matrix."""
        return f"{self.module or self.name}.{self.parameter}"

    def part_of(self, parameter: Tensor) -> Tensor:
        """The matrix ``[out, in]`` as a view into the parameter that holds it."""
        matrix = parameter[self.index] if self.index else parameter
        matrix = matrix.T if self.transposed else matrix
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    def read(self, model: nn.Module) -> Tensor:
        """A contiguous copy of the matrix ``[out, in]`` that ``model`` has now."""
        found = self.part_of(model.get_parameter(self.stored_name).detach())
        return found.clone(memory_format=torch.contiguous_format)

    def write(self, model: nn.Module, weight: Tensor) -> None:
        """Replace the matrix in ``model`` by ``weight`` ``[out, in]``, and nothing beside it.

        A matrix that is all of a parameter becomes a new parameter; others are copied into theirs.
        """
        if self.index or self.rows is not None:
            self.part_of(model.get_parameter(self.stored_name).detach()).copy_(weight)
            return
        stored = weight.T.contiguous() if self.transposed else weight
        owner = model.get_submodule(self.module or self.name)
        setattr(owner, self.parameter, nn.Parameter(stored, requires_grad=False))

    def observe(self, model: nn.Module, look: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``look`` with each input of the matrix as it is multiplied: rounded, where asked.

        Args:
            model: the model that has the matrix.
            look: receives each input ``[..., in]`` before the product.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        module = model.get_submodule(self.module or self.name)

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            look(multiplied_input(module, args[0]))

        return module.register_forward_pre_hook(before)

    def observe_outputs(self, model: nn.Module, look: Callable[[Tensor], None]) -> RemovableHandle:
        """Let ``look`` see each output ``[..., out_features]`` of the matrix, biases included.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            FamilyError: the matrix is one of several in a parameter, whose module has one output.
        """
        if self.index:
            raise FamilyError(f"{self.name} has no output of its own in {self.module}")
        module = model.get_submodule(self.module or self.name)

        def after(_: nn.Module, inputs: object, output: Tensor) -> None:
            look(output if self.rows is None else output[..., slice(*self.rows)])

        return module.register_forward_hook(after)


def multiplied_input(module: nn.Module, x: Tensor) -> Tensor:
    """The input that ``module`` multiplies when it gets ``x``: rounded, if activations are."""
    inputs = getattr(module, INPUTS_NAME, None)
    return inputs(x) if isinstance(inputs, nn.Module) else x


def block_list(model: nn.Module, family: Family) -> nn.ModuleList:
    """The list of decoder blocks of ``model``.

    Raises:
        FamilyError: there is none at the family's path.
    """
    blocks = model.get_submodule(family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise FamilyError(f"{family.blocks} is a {type(blocks).__name__}, not a list of blocks")
    return blocks


def find_layers(model: nn.Module, family: Family) -> list[Layer]:
    """All matrices that a plan can quantize, in running order.

    Args:
        model: only its shapes matter; parameters may be on the meta device.
        family: its architecture.

    Raises:
        FamilyError: a block lacks a matrix that the family names, or has a parameter of two or more
            dimensions that the family does not name (which would stay in 16 bit unnoticed); or its
            experts have no modules of their own.
    """
    embedding = model.get_submodule(family.embedding)
    layers = [Layer(family.embedding, *matrix_shape(embedding, family.embedding), role="embedding")]
    for index, block in enumerate(block_list(model, family)):
        layers.extend(_block_layers(block, index, family))
    head = model.get_submodule(family.head)
    layers.append(Layer(family.head, *matrix_shape(head, family.head), role="head"))
    return layers


def _block_layers(block: nn.Module, index: int, family: Family) -> Iterator[Layer]:
    """The layers of one decoder block, in running order; errors are those of `find_layers`."""
    prefix = f"{family.blocks}.{index}"
    modules = dict(block.named_modules())
    for path in family.experts:
        if path in modules and not isinstance(modules[path], Experts):
            raise FamilyError(
                f"{prefix}.{path} holds experts, which are read from float weights only, and "
                "written only as quantine's own: GGUF files and other engines' directories with "
                "experts are not supported yet"
            )
    covered = {path for group in family.groups_in(index) for path in group}
    kept = {path for path, _ in family.kept}
    for path, parameter in block.named_parameters():
        owner = path.rpartition(".")[0]
        if parameter.ndim >= 2 and owner not in covered and path not in kept:
            kind = type(modules[owner]).__name__
            raise FamilyError(
                f"{prefix}.{path} {tuple(parameter.shape)} in a {kind} is not covered by family "
                f"{family.name!r} (covered: {', '.join(sorted(covered))}): docs/adding.md shows "
                "how to add a family"
            )
    for group, paths in enumerate(family.groups_in(index)):
        for path in paths:
            name = f"{prefix}.{path}"
            if path not in modules:
                raise FamilyError(f"family {family.name!r} expects {name}, which does not exist")
            shape, transposed = matrix_shape(modules[path], name), is_transposed(modules[path])
            around = [one for one in family.experts if path.startswith(f"{one}.")]
            experts = f"{prefix}.{around[0]}" if around else ""
            yield Layer(name, *shape, "block", index, group, transposed, experts=experts)


def embedding_scale(module: nn.Embedding) -> float | None:
    """The factor on the rows that ``module`` looks up; ``None`` if it is not known."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    for name in ("scalar_embed_scale", "embed_scale"):
        scale = getattr(module, name, None)
        if isinstance(scale, int | float):
            return float(scale)
    return None


def are_tied(model: nn.Module, embedding: str, head: str) -> bool:
    """Whether the modules at two paths have one and the same weight."""
    pair = model.get_submodule(embedding), model.get_submodule(head)
    return getattr(pair[0], "weight", None) is getattr(pair[1], "weight", pair)


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` stores its weight as ``[in, out]``, as GPT-2's Conv1D does."""
    return type(module).__name__.endswith("Conv1D")


def matrix_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Shape ``[out, in]`` of the weight of ``module``.

    Raises:
        FamilyError: the module is of another kind, or has no weight.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | nn.Embedding) and not is_transposed(module):
        raise FamilyError(f"{name} is a {type(module).__name__}, which cannot be quantized yet")
    if not isinstance(weight, nn.Parameter):
        raise FamilyError(f"{name} has no weight")
    rows, columns = weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)
