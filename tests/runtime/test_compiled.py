"""Compiled models: a packed matrix is one operator in the graph, and multiplies as without one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from quantine import load
from quantine.core.spec import QuantSpec
from quantine.formats import format_named
from quantine.kernels import backend
from quantine.methods.rtn import RTN
from quantine.runtime.modules import QuantEmbedding, QuantLinear, TiedHead
from quantine.runtime.packed import packed_modules
from quantine.runtime.recorded import _LISTED
from tiny_models import some_tokens

Packed = Callable[[str, str], Path]
OPERATOR = torch.ops.quantine.multiply_packed.default


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


def compiled(module: Any, backend: str = "aot_eager") -> tuple[Any, list[Any]]:
    """``module`` compiled as one graph, and the operators in it, once it has run."""
    from torch._dynamo import lookup_backend  # type: ignore[attr-defined]

    found: list[Any] = []
    compile_graph = lookup_backend(backend)

    def look(graph: GraphModule, inputs: list[Tensor]) -> Any:
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return compile_graph(graph, inputs)

    return torch.compile(module, fullgraph=True, backend=look), found


def products(operators: list[Any]) -> int:
    return sum(target in (OPERATOR, OPERATOR._op) for target in map(overload, operators))


def overload(target: Any) -> Any:
    return getattr(target, "_opoverload", target)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_is_one_graph_with_one_operator_for_a_matrix(backend: str, packed: Packed) -> None:
    model, _ = load(packed("llama", "mixed"))
    tokens = some_tokens(5)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        whole, operators = compiled(model, backend)
        found = whole(tokens, use_cache=False).logits
    assert products(operators) == len(list(packed_modules(model))) > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def linear(rows: int = 24) -> QuantLinear:
    spec = QuantSpec(4, 32)
    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(7))
    return QuantLinear(
        "dense", spec, rows, 128, format_named("dense").pack(RTN()(weight, None, spec))
    )


def test_programs_of_gpus_are_in_the_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    module, x = linear(), torch.randn(2, 128, generator=torch.Generator().manual_seed(8))
    whole, operators = compiled(module)
    with torch.no_grad():
        expected, found = module(x), whole(x)
    assert products(operators) == 1
    assert torch.equal(found, expected)


def test_a_packed_table_and_a_head_that_shares_it() -> None:
    spec = QuantSpec(8, -1)
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(9))
    packed = format_named("dense").pack(RTN()(weight, None, spec))
    table = QuantEmbedding("dense", spec, 50, 64, packed)
    pair = torch.nn.Sequential(table, TiedHead(table))
    whole, operators = compiled(pair)
    tokens = torch.tensor([[3, 3, 49]])
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens), pair(tokens), rtol=1e-5, atol=1e-5)
    assert products(operators) == 1


def test_a_graph_multiplies_with_what_the_module_has_when_it_runs() -> None:
    module, x = linear(), torch.ones(1, 128)
    whole, _ = compiled(module)
    with torch.no_grad():
        whole(x)
        module.get_buffer("codes").zero_()
        assert torch.equal(whole(x), module(x))


def test_gradients_of_compiled_products_are_those_of_the_decoded_matrix() -> None:
    module = linear()
    whole, operators = compiled(module)
    x = torch.randn(3, 128, requires_grad=True)
    whole(x).sum().backward()
    assert products(operators) == 0
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.dequantize().sum(0).expand(3, -1))


def test_numbers_belong_to_living_modules() -> None:
    module = linear()
    twin = copy.deepcopy(module)
    assert _LISTED[module._number] is module
    assert _LISTED[twin._number] is twin
    number = twin._number
    del twin
    gc.collect()
    assert number not in _LISTED
    assert linear()._number > number


def test_what_is_exported_needs_no_operator_of_this_process() -> None:
    module = linear()
    program = torch.export.export(module, (torch.ones(2, 128),))
    targets = [overload(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert OPERATOR not in targets
    torch.testing.assert_close(program.module()(torch.ones(2, 128)), module(torch.ones(2, 128)))


def test_generate_with_a_static_cache_compiles_the_model(packed: Packed) -> None:
    from transformers import CompileConfig

    model, _ = load(packed("llama", "gptq"), torch.float32)
    tokens = some_tokens(5, 1)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens, **options)
    made_for_gpus = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    made_for_gpus._compile_all_devices = True
    found = model.generate(
        tokens, cache_implementation="static", compile_config=made_for_gpus, **options
    )
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
