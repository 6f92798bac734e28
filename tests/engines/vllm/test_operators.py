"""Layers as operators of PyTorch: one node in a compiled graph, the same for all blocks."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantine.engines.linear import FloatPart, FusedLinear
from quantine.engines.vllm import operators
from samples import generator, random_weight


def layer(seed: int) -> FusedLinear:
    return FusedLinear([FloatPart(random_weight(6, 4, seed))])


def some(rows: int) -> Tensor:
    return torch.randn(rows, 4, generator=generator(rows))


def test_a_layer_is_found_by_its_number() -> None:
    one, two = layer(1), layer(2)
    first, second = operators.numbered(one), operators.numbered(two)
    assert torch.equal(operators.linear(some(3), first, 6), one(some(3)))
    assert torch.equal(operators.linear(some(3), second, 6), two(some(3)))


def test_numbers_keep_nothing_alive() -> None:
    one = layer(1)
    number = operators.numbered(one)
    del one
    gc.collect()
    with pytest.raises(KeyError):
        operators.linear(some(3), number, 6)


def test_operators_are_as_pytorch_wants_them() -> None:
    one = layer(1)
    number = operators.numbered(one)
    torch.library.opcheck(operators._linear, (some(3), number, 6))
    table = torch.nn.Embedding(5, 4)
    rows = operators.numbered(table)
    tokens = torch.tensor([[1, 2], [0, 4]])
    with torch.no_grad():
        found = operators.embedding(tokens, rows, 4, torch.float32)
    assert torch.equal(found, table(tokens))


def test_graphs_of_blocks_are_one_graph_and_of_any_length() -> None:
    blocks = [layer(seed) for seed in range(3)]
    numbers = [operators.numbered(block) for block in blocks]
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def block(x: Tensor, number: Tensor) -> Tensor:
        return operators.linear(x, number, 6).relu()

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 5, 70):
        for one, number in zip(blocks, numbers, strict=True):
            assert torch.equal(compiled(some(rows), number), one(some(rows)).relu())
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("engine_linear" in target for target in called) == 1


def test_a_second_registration_does_no_harm() -> None:
    one = layer(1)
    importlib.reload(operators)
    number = operators.numbered(one)
    assert torch.equal(operators.linear(some(3), number, 6), one(some(3)))


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = points["quantine"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_nothing_of_vllm_is_imported_until_it_asks() -> None:
    code = (
        "import quantine.engines.vllm.plugin, quantine.engines.vllm.stored, sys;"
        "import quantine.engines.vllm.operators, quantine.engines.vllm.share;"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"vllm", "transformers"} & {name.split(".")[0] for name in done.stdout.split()}
