"""Packed modules: what they compute, and what casting, copying and saving do to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.core.qtensor import QTensor
from quantine.core.spec import CLUSTERS, QuantSpec
from quantine.formats import format_named
from quantine.kernels.integer import levels
from quantine.kernels.integer.cpu import SCALAR
from quantine.methods.rtn import RTN
from quantine.runtime.modules import QuantEmbedding, QuantLinear, TiedHead
from quantine.runtime.packed import packed_modules
from tiny_models import LEVELS, bits_equal

OUT, IN = 20, 48


def random_qtensor(spec: QuantSpec, rows: int = OUT) -> QTensor:
    generator = torch.Generator().manual_seed(3)
    return RTN()(torch.randn(rows, IN, generator=generator), None, spec)


def make_linear(spec: QuantSpec, bias: bool = True) -> tuple[QuantLinear, Tensor]:
    """A module and the float32 matrix it stands for."""
    qtensor = random_qtensor(spec)
    vector = nn.Parameter(torch.linspace(-1, 1, OUT), requires_grad=False) if bias else None
    packed = format_named("dense").pack(qtensor)
    return QuantLinear("dense", spec, OUT, IN, packed, vector), qtensor.dequantize()


def make_table(scale: float = 1.0) -> tuple[QuantEmbedding, Tensor]:
    spec = QuantSpec(8, -1)
    qtensor = random_qtensor(spec, rows=300)
    packed = format_named("dense").pack(qtensor)
    return QuantEmbedding("dense", spec, 300, IN, packed, scale), qtensor.dequantize()


@pytest.mark.parametrize(("bits", "sym"), LEVELS)
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (3, IN), (2, 5, IN), (0, IN), (1, 2, 3, IN)])
def test_a_linear_multiplies_any_batch(bits: int, sym: bool, shape: tuple[int, ...]) -> None:
    module, weight = make_linear(QuantSpec(bits, 16, sym))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    assert module.bias is not None
    expected = (x.double() @ weight.double().T + module.bias.double()).float()
    assert module(x).shape == (*shape[:-1], OUT)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
@pytest.mark.parametrize("group_size", [-1, OUT, 4])
def test_groups_along_outputs_multiply_as_the_decoded_matrix(rows: int, group_size: int) -> None:
    module, weight = make_linear(QuantSpec(3, group_size, group_axis="out"), bias=False)
    assert module.matrix() is not None
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(module(x), x @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    module, weight = make_linear(QuantSpec(4, 16), bias=False)
    x = torch.randn(7, IN, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert module(x).dtype == dtype
    exact = x.double() @ weight.double().T
    bound = 4 * torch.finfo(dtype).eps * (x.double().abs() @ weight.double().abs().T)
    assert ((module(x).double() - exact).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_touch_the_bias_only(dtype: torch.dtype) -> None:
    module, weight = make_linear(QuantSpec(3, 16))
    before = {name: tensor.clone() for name, tensor in module.packed_tensors().items()}
    module.to(dtype)
    assert module.bias is not None
    assert module.bias.dtype == dtype
    after = module.packed_tensors()
    assert {name: t.dtype for name, t in after.items()} == {
        "codes": torch.uint8,
        "scale": torch.float16,
        "zero": torch.uint8,
    }
    assert all(bits_equal(after[name], before[name]) for name in before)
    assert torch.equal(module.dequantize(), weight)


def test_a_move_moves_packed_tensors_with_their_dtypes() -> None:
    module, _ = make_linear(QuantSpec(3, 16))
    module.to("meta")
    assert {t.device.type for t in module.packed_tensors().values()} == {"meta"}
    assert module.packed_tensors()["scale"].dtype == torch.float16


def test_copies_and_state_dicts_carry_the_packed_tensors() -> None:
    module, _ = make_linear(QuantSpec(5, 16))
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(4))
    assert module.state_dict().keys() == {"codes", "scale", "zero", "bias"}
    twin = copy.deepcopy(module)
    assert bits_equal(twin(x), module(x))
    twin.codes.zero_()
    assert not torch.equal(twin(x), module(x))
    twin.load_state_dict(module.state_dict())
    assert bits_equal(twin(x), module(x))


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("tokens", [[[5, 5, 299], [0, 7, 5]], [3], [[[1], [2]]]])
def test_an_embedding_looks_rows_up(tokens: list[object], scale: float) -> None:
    module, table = make_table(scale)
    found = module(torch.tensor(tokens))
    assert torch.equal(found, table[torch.tensor(tokens)] * scale)
    module.to(torch.bfloat16)
    assert module(torch.tensor(tokens)).dtype == torch.bfloat16
    assert torch.equal(module.dequantize(), table)


def test_a_tied_head_computes_with_the_table_but_does_not_own_it() -> None:
    table, weight = make_table()
    head = TiedHead(table)
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(head(x), x @ weight.T)
    assert head.state_dict() == {}
    assert [name for name, _ in packed_modules(nn.ModuleDict({"a": table, "b": head}))] == ["a"]


def test_a_deep_copy_of_a_tied_pair_stays_tied_to_the_copy() -> None:
    table, _ = make_table()
    pair = copy.deepcopy(nn.ModuleDict({"table": table, "head": TiedHead(table)}))
    pair["table"].codes.zero_()
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(pair["head"](x), x @ pair["table"].dequantize().T)


class TestNativeMatrix:
    """When the native matrix is made again, and when it is left alone."""

    def test_replaced_and_written_tensors_count(self) -> None:
        module, weight = make_linear(QuantSpec(4, 16), bias=False)
        x = torch.eye(IN)[:8]
        assert torch.allclose(module(x), x @ weight.T, atol=1e-6)
        with torch.no_grad():
            module.scale.mul_(2)
        assert torch.allclose(module(x), 2 * x @ weight.T, atol=1e-6)
        for _ in range(3):  # freed addresses come back
            module.scale = module.scale * 2
        assert torch.allclose(module(x), 16 * x @ weight.T, atol=1e-5)

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            module, weight = make_linear(QuantSpec(4, 16), bias=False)
            x = torch.eye(IN)[:8]
            assert torch.allclose(module(x), x @ weight.T, atol=1e-6)

    @pytest.mark.filterwarnings("ignore")  # what torch.jit has to say of itself and of checks
    def test_recordings_depend_on_the_input(self) -> None:
        module, weight = make_linear(QuantSpec(4, 16), bias=False)
        with torch.no_grad():
            recorded = torch.jit.trace(module, torch.ones(2, IN), check_trace=False)
        x = torch.eye(IN)[:2]
        assert torch.allclose(recorded(x), x @ weight.T, atol=1e-6)

    def test_gradients_reach_the_input(self) -> None:
        module, weight = make_linear(QuantSpec(4, 16), bias=False)
        x = torch.ones(1, IN, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None
        assert torch.allclose(x.grad[0], weight.sum(0), atol=1e-5)

    @pytest.mark.parametrize("rows", [1, 16, 17, 40])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_few_and_many_rows(self, rows: int, dtype: torch.dtype) -> None:
        module, weight = make_linear(QuantSpec(4, 16), bias=False)
        x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)).to(dtype)
        tolerance = 1e-2 if dtype == torch.float16 else 1e-5
        assert module(x).dtype == dtype
        assert torch.allclose(module(x).double(), x.double() @ weight.double().T, atol=tolerance)


needs_integers = pytest.mark.skipif(
    levels() in ([], [SCALAR]), reason="no instructions for integers: floats are multiplied"
)


class TestRoundedInputs:
    """Matrices whose inputs are rounded multiply integers where they can."""

    SIZES = (5, 20, 23)

    def gridded(self, kind: str, bits: int = 8) -> QuantLinear:
        spec = QuantSpec(4, CLUSTERS, cluster_sizes=self.SIZES)
        module, _ = make_linear(spec)
        labels = torch.arange(3).repeat_interleave(torch.tensor(self.SIZES)).int()
        scale, zero = torch.tensor([0.02, 0.03, 0.01]), torch.tensor([128.0, 30.0, 300.0])
        static = StaticGrid(bits, scale, zero, labels)
        module.inputs = TokenGrid(bits) if kind == "token" else static
        return module

    def simulated(self, module: QuantLinear, x: Tensor) -> Tensor:
        assert module.inputs is not None
        assert module.bias is not None
        return module.inputs(x) @ module.dequantize().to(x.dtype).T + module.bias.to(x.dtype)

    @needs_integers
    @pytest.mark.parametrize("kind", ["static", "token"])
    @pytest.mark.parametrize("shape", [(IN,), (1, IN), (12, IN), (2, 70, IN), (0, IN)])
    def test_the_product_is_the_simulated_one(self, kind: str, shape: tuple[int, ...]) -> None:
        module = self.gridded(kind)
        assert module.input_grid() is not None
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(module(x), self.simulated(module, x), atol=2e-5, rtol=2e-5)
        assert "integers" in repr(module)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_other_dtypes_are_rounded_at_the_end_only(self, dtype: torch.dtype) -> None:
        module = self.gridded("static")
        x = torch.randn(20, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = module(x)
        assert found.dtype == dtype
        expected = self.simulated(module, x.float())
        tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
        assert float((found.float() - expected).abs().max()) <= tolerance

    def test_gradients_and_float64_are_simulated(self) -> None:
        module = self.gridded("static")
        x = torch.randn(20, IN, generator=torch.Generator().manual_seed(1))
        wanted = module(x.clone().requires_grad_())
        assert wanted.requires_grad
        torch.testing.assert_close(module(x), wanted.detach(), atol=2e-5, rtol=2e-5)
        assert module(x.double()).dtype == torch.float64

    def test_grids_that_groups_of_weights_cross_are_simulated(self) -> None:
        module = self.gridded("static")
        assert isinstance(module.inputs, StaticGrid)
        module.inputs.labels[4] = 1
        assert module.input_grid() is None
        assert "floats" in repr(module)
        x = torch.randn(20, IN, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(module(x), self.simulated(module, x), atol=1e-5, rtol=1e-5)

    def test_another_grid_and_other_weights_count(self) -> None:
        module = self.gridded("static")
        x = torch.randn(20, IN, generator=torch.Generator().manual_seed(1))
        module(x)
        assert isinstance(module.inputs, StaticGrid)
        module.inputs.refit(torch.full((3,), 0.05), torch.full((3,), 100.0))
        torch.testing.assert_close(module(x), self.simulated(module, x), atol=2e-5, rtol=2e-5)
        with torch.no_grad():
            module.scale.mul_(2)
        twin = copy.deepcopy(module)
        torch.testing.assert_close(twin(x), self.simulated(module, x), atol=5e-5, rtol=5e-5)

    @pytest.mark.parametrize("kind", ["static", "token"])
    @pytest.mark.parametrize("way", ["patch", "subclass", "hook", "pre-hook"])
    def test_overridden_grids_count(self, kind: str, way: str) -> None:
        module = self.gridded(kind)
        x = torch.randn(20, IN, generator=torch.Generator().manual_seed(1))
        before = module(x)
        grid = module.inputs
        assert grid is not None
        old = grid.forward
        if way == "patch":
            grid.forward = lambda x: old(x) * 2  # type: ignore[method-assign]
        elif way == "subclass":
            forward = type(grid).forward
            other = {"forward": lambda self, x: forward(self, x) * 2}
            grid.__class__ = type("Other", (type(grid),), other)
        elif way == "hook":
            grid.register_forward_hook(lambda module, args, output: output * 2)
        else:
            grid.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        found = module(x)
        assert not torch.allclose(found, before, atol=1e-2)
        torch.testing.assert_close(found, self.simulated(module, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [1, 17, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_too_small_for_float16_multiply_activations_of_any_dtype(
    rows: int, dtype: torch.dtype
) -> None:
    generator, spec = torch.Generator().manual_seed(3), QuantSpec(8, 16)
    qtensor = RTN()(torch.randn(OUT, IN, generator=generator) * 2.0**-30, None, spec)
    module = QuantLinear("dense", spec, OUT, IN, format_named("dense").pack(qtensor))
    assert "exponent" in module.tensor_names
    x = (torch.randn(rows, IN, generator=generator) * 2.0**13).to(dtype)
    expected = (x.double() @ qtensor.dequantize().double().T).float()
    for copied in (module, copy.deepcopy(module).to(dtype)):
        found = copied(x)
        assert found.dtype == dtype
        assert float((found.float() - expected).norm() / expected.norm()) < 0.01
    wanted = module(x.clone().requires_grad_()).detach()
    assert float((wanted.float() - expected).norm() / expected.norm()) < 0.01
