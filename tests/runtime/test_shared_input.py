"""Inputs that several matrices read are rounded once, in one launch with the norm before.

Triton interprets the programs here on the CPU. Whatever happens to an input between two readers,
each gets codes of what it reads.
"""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from other_device import NAME, OtherDevice
from quantine import RTN, QuantSpec, load
from quantine.activations.grids import StaticGrid
from quantine.activations.modules import PermutedNorm
from quantine.families.family import Family, Link
from quantine.formats import format_named
from quantine.kernels import backend, integer
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.integer.units.inputs import Rounded
from quantine.kernels.matrix.units.layout import UNIT
from quantine.runtime import recording as recordings
from quantine.runtime import shared_input
from quantine.runtime.modules import QuantLinear
from quantine.runtime.rounding_norm import RoundingNorm, norm_of, share_inputs
from samples import generator, random_weight

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

WIDTH = 48
READERS = ("q", "k", "v")
LINKS = (Link("R1", "gather", ("norm",), READERS),)
FAMILY = Family("tests", (), "blocks", (READERS,), "embedding", links=LINKS)
OUTPUTS = 2
NUMBERS = torch.randn(4 * UNIT, OUTPUTS, generator=generator(3))
NORMS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaRMSNorm(WIDTH),
    "gemma": lambda: Gemma3RMSNorm(WIDTH),
    "opt": lambda: nn.LayerNorm(WIDTH),
}


def grid(scale: float = 0.03) -> StaticGrid:
    labels = torch.tensor([0] * 20 + [1] * 28, dtype=torch.int32)
    return StaticGrid(8, torch.tensor([scale, scale / 2]), torch.tensor([120.0, 130.0]), labels)


def reader(seed: int) -> QuantLinear:
    spec = QuantSpec(bits=4, group_size=0, cluster_sizes=(20, 28))
    packed = format_named("dense").pack(RTN()(random_weight(OUTPUTS, WIDTH, seed=seed), None, spec))
    made = QuantLinear("dense", spec, OUTPUTS, WIDTH, packed)
    made.inputs = grid()
    return made


class Block(nn.Module):
    """A reordered norm and three matrices that read what it writes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for number, parameter in enumerate(norm.parameters()):
            parameter.data = torch.randn(WIDTH, generator=generator(number)) + 1
        self.norm = PermutedNorm(norm, torch.randperm(WIDTH, generator=generator(9)).int())
        for number, name in enumerate(READERS):
            setattr(self, name, reader(number))

    def readers(self) -> list[QuantLinear]:
        return [getattr(self, name) for name in READERS]

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return torch.cat([matrix(normed) for matrix in self.readers()], -1)


class Operators(TorchDispatchMode):
    """Counts operators of PyTorch by name, each of which is a launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    @property
    def roundings(self) -> int:
        return self.names.count("quantine::round_inputs")


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*tensors: Tensor | None) -> str:
        on = {tensor.device.type for tensor in tensors if tensor is not None}
        return "triton" if on == {"cpu"} else "reference"

    monkeypatch.setattr(backend, "of", of)


def summed(matrix: GriddedMatrix, x: Rounded, dtype: torch.dtype) -> Tensor:
    """A product that takes no time to interpret: of the codes with the same numbers always."""
    codes = x.codes
    if codes.dim() == 3:
        codes = codes.transpose(1, 2).contiguous().view(torch.int8).flatten(1)
    return (codes.float() @ NUMBERS).to(dtype)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "multiply_rounded", summed)


def block_of(norm: str = "llama") -> Block:
    block = Block(NORMS[norm]())
    share_inputs(block, FAMILY)
    for matrix in block.readers():
        matrix.input_grid(torch.device("cpu"))  # as a first forward arranges it
    return block.eval()


@pytest.fixture
def block(_on_a_gpu: None, _quick: None) -> Block:
    return block_of()


def some(rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(1, rows, WIDTH, generator=generator(seed))


def alone(matrix: QuantLinear, x: Tensor) -> Tensor:
    """What ``matrix`` makes of the values of ``x``, with codes of its own."""
    shared, matrix.shared = matrix.shared, None
    with torch.inference_mode(False), torch.no_grad():
        found: Tensor = matrix(x.detach().clone())
    matrix.shared = shared
    return found


def unfused(block: Block, x: Tensor) -> Tensor:
    """What ``block`` makes of ``x`` without sharing anything."""
    norm = block.norm
    with torch.no_grad():
        normed = PermutedNorm(norm.norm, norm.get_buffer("order"))(x)
        return torch.cat([alone(matrix, normed) for matrix in block.readers()], -1)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for values next to the middle between two codes, which may get either."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(("norm", "rows"), [("llama", 1), ("gemma", 1), ("opt", 5)])
def test_norm_gather_and_rounding_are_one_launch(norm: str, rows: int) -> None:
    block, x = block_of(norm), some(rows)
    with torch.no_grad(), Operators() as found:
        block.norm(x)  # puts orders together
        found.names.clear()
        normed = block.norm(x)
        launches = found.names.copy()
        products = [matrix(normed) for matrix in block.readers()]
    assert isinstance(block.norm, RoundingNorm)
    assert found.roundings == 1
    assert found.names.count("quantine::multiply_rounded") == len(products)
    assert "aten::index_select" not in found.names
    own = {"quantine::round_inputs", "aten::view", "aten::detach"}
    assert set(launches) - own == ({"aten::add"} if norm == "gemma" else set())
    torch.testing.assert_close(normed, PermutedNorm.forward(block.norm, x))
    for matrix, product in zip(block.readers(), products, strict=True):
        assert torch.equal(product, alone(matrix, normed))


def test_matrices_without_such_a_norm_share_too(block: Block) -> None:
    x = some()
    with torch.no_grad(), Operators() as found:
        products = [matrix(x) for matrix in block.readers()]
    assert found.roundings == 1
    for matrix, product in zip(block.readers(), products, strict=True):
        assert torch.equal(product, alone(matrix, x))


def test_a_first_forward_arranges_what_later_ones_share(block: Block) -> None:
    x = some()
    for matrix in block.readers():
        matrix._forget()
    with torch.no_grad():
        first = block(x)
        with Operators() as found:
            assert_same(block(x), first)
    assert found.roundings == 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda x: x.mul_(2),
    "a view of it": lambda x: x[0, 1:].zero_(),
    "by an index": lambda x: x.view(-1).__setitem__(slice(7), 3.0),
    "all of it": lambda x: x.copy_(some(seed=4)),
    "its memory": lambda x: x.set_(some(seed=4)),  # type: ignore[call-overload]
    "its data": lambda x: setattr(x, "data", some(seed=4)),
}


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_who_reads_after_a_write_gets_codes_of_it(
    block: Block, write: Callable[[Tensor], Any], norms: bool
) -> None:
    with torch.no_grad():
        x = block.norm(some()) if norms else some()
        block.q(x)
        write(x)
        assert torch.equal(block.k(x), alone(block.k, x))
        assert torch.equal(block.v(x), alone(block.v, x))


def test_equal_values_in_another_tensor_are_another_input(block: Block) -> None:
    x = some()
    with torch.no_grad(), Operators() as found:
        block.q(x)
        block.k(x.clone())
        block.v(x.view(x.shape))
    assert found.roundings == 3


def test_a_reader_that_comes_again_begins_anew(block: Block) -> None:
    x = some()
    with torch.no_grad():
        block.q(x)
        x.data.mul_(2)  # as a replayed graph would: PyTorch does not count it
        for matrix in (block.q, block.k):
            assert torch.equal(matrix(x), alone(matrix, x))


def test_a_norm_that_runs_again_begins_anew(block: Block) -> None:
    x = some()
    with torch.no_grad():
        block.q(x)
        block.norm(some(seed=2))
        x.data.mul_(2)
        assert torch.equal(block.k(x), alone(block.k, x))


def test_hooks_change_what_one_matrix_reads(block: Block) -> None:
    block.k.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    block.norm.register_forward_hook(lambda _, args, output: output + 1)
    with torch.no_grad():
        normed = PermutedNorm.forward(block.norm, some()) + 1
        found = block(some()).split(OUTPUTS, -1)
    assert_same(found[0], alone(block.q, normed))
    assert_same(found[1], alone(block.k, normed))
    assert_same(found[2], alone(block.v, normed))


def test_readers_that_round_otherwise_have_codes_of_their_own(block: Block) -> None:
    block.k.inputs = grid(0.05)
    with torch.no_grad(), Operators() as found:
        products = block(some())
    assert found.roundings == 2
    assert_same(products, unfused(block, some()))
    block.v.get_submodule("inputs").get_buffer("scale").mul_(3)
    with torch.no_grad():
        assert_same(block(some()), unfused(block, some()))


def test_inference_mode_counts_no_writes_and_so_shares_nothing(block: Block) -> None:
    with torch.inference_mode():
        x = block.norm(some())
        with Operators() as found:
            first = block.q(x)
            x.mul_(2)
            second = block.k(x)
    assert found.roundings == 2
    assert torch.equal(first, alone(block.q, x.clone() / 2))
    assert torch.equal(second, alone(block.k, x.clone()))


def test_another_stream_or_a_graph_shares_nothing(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = itertools.count()
    monkeypatch.setattr(shared_input, "_place", lambda _: next(streams))
    with torch.no_grad(), Operators() as found:
        assert_same(block(some()), unfused(block, some()))
    assert found.roundings == 4 + len(READERS)


def test_recordings_in_one_stream_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([7, 7, 8])

    def said(stream: Any, status: Any, number: Any, *_: None) -> int:
        status._obj.value, number._obj.value = recordings.GOING_ON, next(numbers)
        return int(stream.value != 5)

    monkeypatch.setattr(recordings, "_capture_info", lambda: said)
    stream: Any = SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert recordings.recording(stream) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first, again, other = (recordings.recording(stream) for _ in range(3))
    assert first == again != other
    for unknown in (None, lambda *_: 1):
        monkeypatch.setattr(recordings, "_capture_info", lambda unknown=unknown: unknown)
        assert recordings.recording(stream) != recordings.recording(stream)


def test_what_is_recorded_computes_from_what_it_reads(block: Block) -> None:
    x = some()
    with torch.no_grad():
        block(x)
        graph = make_fx(lambda: block(x), tracing_mode="real")()
        x.copy_(some(seed=2))
        assert_same(graph(), unfused(block, x))
    names = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert names.count(torch.ops.quantine.round_inputs.default) == 1


def test_compiled_blocks_are_one_graph_and_share_nothing(block: Block) -> None:
    torch._dynamo.reset()
    whole = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(whole(some()), unfused(block, some()))
        x = some()
        assert torch.equal(block.q.rounded_product(x), alone(block.q, x))
        x.data.mul_(2)  # as compiled programs reuse memory
        assert torch.equal(block.k.rounded_product(x), alone(block.k, x))
    assert block.q.shared is not None
    assert block.q.shared._kept is None


def test_autocast_and_gradients_let_the_norm_compute_itself(block: Block) -> None:
    with torch.no_grad(), torch.autocast("cpu"), Operators() as found:
        block.norm(some())
    assert found.roundings == 0
    assert block.norm(some()).requires_grad  # its weight wants one
    block.norm.requires_grad_(False)
    assert block.norm(some().requires_grad_()).requires_grad
    with Operators() as found:
        block.norm(some())
    assert found.roundings == 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "written to": lambda norm: norm.weight.mul_(3),
    "its data": lambda norm: norm.weight.data.mul_(3),
    "replaced": lambda norm: setattr(norm, "weight", nn.Parameter(norm.weight * 3)),
    "epsilon": lambda norm: setattr(norm, "variance_epsilon", 3.0),
    "hook": lambda norm: norm.register_forward_hook(lambda _, args, output: output * 2),
    "method": lambda norm: setattr(norm, "forward", lambda x: x + 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_norm_that_changes_is_noticed(block: Block, change: Callable[[Any], Any]) -> None:
    with torch.no_grad():
        before = block(some())
        change(block.norm.norm)
        found = block(some())
    assert float((found - before).abs().max()) > 0.1 * float(before.abs().max())
    assert_same(found, unfused(block, some()))


def test_a_norm_of_another_class_or_patched_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return -super().forward(hidden_states)

    for module in (Own(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm((2, WIDTH)), nn.Identity()):
        assert norm_of(module) is None
    norm = LlamaRMSNorm(WIDTH)
    assert norm_of(norm) is not None
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda _, x: x)
    assert norm_of(norm) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_among_themselves(block: Block, copied: Callable[[Block], Block]) -> None:
    x = some()
    with torch.no_grad():
        block.q(x)
        twin = copied(block)
        first, *others = (matrix.shared for matrix in twin.readers())
        assert first is not None
        assert first is not block.q.shared
        assert all(other is first for other in others)
        assert isinstance(twin.norm, RoundingNorm)
        assert twin.norm.shared is first
        assert first._kept is None
        twin(x)  # arranges its matrices
        with Operators() as found:
            assert_same(twin(some(seed=2)), unfused(block, some(seed=2)))
    assert found.roundings - len(READERS) == 1


def test_codes_go_with_the_input_and_after_the_last_reader(block: Block) -> None:
    shared = block.q.shared
    assert shared is not None
    x = some()
    with torch.no_grad():
        block.q(x)
        assert shared._kept is not None
        del x
        gc.collect()
        assert shared._kept is None
        block(some())
    assert shared._kept is None


def test_a_block_that_moves_to_another_device_and_back(block: Block) -> None:
    norm, expected = block.norm, unfused(block, some())
    with torch.no_grad(), OtherDevice():
        block(some())
        floats = PermutedNorm(norm.norm, norm.get_buffer("order"))(some())
        products = [m.get_submodule("inputs")(floats) @ m.dequantize().T for m in block.readers()]
        found = block.to(NAME)(some().to(NAME)).cpu()
        torch.testing.assert_close(found, torch.cat(products, -1), rtol=1e-4, atol=1e-4)
        block.to("cpu")
        block(some())
        with Operators() as operators:
            assert_same(block(some()), expected)
    assert operators.roundings == 1


def test_a_block_that_is_cast(block: Block) -> None:
    block.to(torch.bfloat16)
    x = some().bfloat16()
    with torch.no_grad(), Operators() as found:
        products = block(x)
    assert found.roundings == 1
    assert_same(products, unfused(block, x))


def test_stored_tensors_are_those_of_blocks_that_share_nothing(block: Block) -> None:
    plain = Block(NORMS["llama"]())
    assert block.state_dict().keys() == plain.state_dict().keys()
    order = plain.norm.get_buffer("order")
    order.copy_(order.flip(0))
    with torch.no_grad():
        before = block(some())
        block.load_state_dict(plain.state_dict())
        found = block(some())
    assert float((found - before).abs().max()) > 0.1 * float(before.abs().max())
    assert_same(found, unfused(block, some()))


def test_a_loaded_model_shares(packed: Callable[[str, str], Path]) -> None:
    model, _ = load(packed("llama", "W4A8"))
    layer = model.model.layers[0]
    norms, attention = (layer.input_layernorm, layer.post_attention_layernorm), layer.self_attn
    assert all(isinstance(norm, RoundingNorm) for norm in norms)
    assert norms[0].shared is attention.q_proj.shared is attention.v_proj.shared
    assert norms[1].shared is layer.mlp.gate_proj.shared is layer.mlp.up_proj.shared
    assert attention.o_proj.shared is not layer.mlp.down_proj.shared
