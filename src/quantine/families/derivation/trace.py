"""What a model does with its parameters while it runs: products in their order, and other uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantine.families.layers import embedding_scale, is_transposed

Input = tuple[Any, ...]
"""What tells the inputs of products apart; equal for views of the same rows in the same order."""


@dataclass(frozen=True)
class Product:
    """A product of a matrix with its input.

    Attributes:
        name: full name of the module that has the matrix.
        input: equal for two products if and only if they read the same tensor.
        shape: ``[out, in]`` of the matrix.
    """

    name: str
    input: Input
    shape: tuple[int, int]


@dataclass
class Trace:
    """A record of one forward pass.

    Attributes:
        products: of modules that are called like matrices, in running order.
        calls: names of all modules that ran, in the order in which they began.
        outputs: number of values in the tuple or list that a module returned, by its name; 0 where
            it returned something else.
        unlike: names of modules that put out something else than the product, or rows of the table,
            that their class suggests.
        uses: names of the functions that read a parameter of two or more dimensions, or an
            attribute of it with a dot before its name, by the parameter's full name. What a matrix
            or a table reads of itself does not count.
        writers: name of the first module that returned a tensor, by what `Product.input` is for
            products that read it; matrices and tables do not count.
    """

    products: list[Product] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    unlike: set[str] = field(default_factory=set)
    uses: dict[str, set[str]] = field(default_factory=dict)
    writers: dict[Input, str] = field(default_factory=dict)


def is_matrix(module: nn.Module) -> bool:
    """Whether ``module`` is called like one that multiplies by a matrix of its own."""
    return isinstance(module, nn.Linear) or is_transposed(module)


@contextmanager
def traced(model: nn.Module) -> Iterator[Trace]:
    """A context in which a forward pass of ``model`` is recorded."""
    recorder = _Recorder(model)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(recorder.before(name)).remove)
            stack.callback(module.register_forward_hook(recorder.after(name)).remove)
        stack.enter_context(recorder)
        yield recorder.trace


class _Recorder(TorchFunctionMode):
    """Makes a `Trace`: of modules by hooks, and of functions by standing between them and PyTorch.

    Args:
        model: the model that will run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self._inside: list[nn.Module] = []  # the matrices and tables that are running
        self._alive: list[Tensor] = []  # inputs, so that no later tensor gets their place
        self._names = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2
        }

    def before(self, name: str) -> Callable[..., None]:
        """The hook for the calls of the module ``name``."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.trace.calls.append(name)
            if is_matrix(module) or isinstance(module, nn.Embedding):
                self._inside.append(module)
            if is_matrix(module) and args:
                self._alive.append(args[0])
                rows, columns = module.get_parameter("weight").shape
                shape = (columns, rows) if is_transposed(module) else (rows, columns)
                self.trace.products.append(Product(name, _input(args[0]), shape))

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """The hook for what the module ``name`` returns."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.trace.outputs[name] = len(output) if isinstance(output, tuple | list) else 0
            if is_matrix(module) or isinstance(module, nn.Embedding):
                if not (args and _does_as_its_class(module, args[0], output)):
                    self.trace.unlike.add(name)
                self._inside.pop()
            elif isinstance(output, Tensor) and output.ndim:
                self._alive.append(output)
                self.trace.writers.setdefault(_input(output), name)

        return hook

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note the parameters among the arguments, and call ``func``."""
        if not self._inside:
            for tensor in _tensors((args, kwargs)):
                name = self._names.get(tensor.untyped_storage().data_ptr())
                if name is not None:
                    self.trace.uses.setdefault(name, set()).add(_named(func))
        return func(*args, **(kwargs or {}))


def _does_as_its_class(module: Any, x: Tensor, output: Any) -> bool:
    if isinstance(module, nn.Embedding):
        scale = embedding_scale(module)
        expected = None if scale is None else module.weight[x] * scale
    else:
        weight = module.weight.T if is_transposed(module) else module.weight
        expected = nn.functional.linear(x, weight, module.bias)
    if expected is None or not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    return torch.allclose(output, expected, rtol=1e-4, atol=1e-5)


def _named(func: Any) -> str:
    """What PyTorch calls a function, or with a dot before it the attribute that it gets."""
    name: str = getattr(func, "__name__", str(func))
    return f".{func.__self__.__name__}" if name == "__get__" else name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _input(x: Tensor) -> Input:
    """Place of ``x`` in memory, how often it was written to, and how its rows lie."""
    place = (x.untyped_storage().data_ptr(), x.storage_offset(), x._version)
    rows = () if x.is_contiguous() else (x.shape, x.stride())
    return (*place, x.numel(), x.shape[-1], rows)
