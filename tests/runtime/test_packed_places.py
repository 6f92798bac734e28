"""Where the bytes of a packed matrix are once a GPU has arranged them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from other_device import NAME, OtherDevice, tensors_in
from quantine.activations.grids import StaticGrid
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec
from quantine.formats import format_named
from quantine.kernels import backend
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix
from quantine.methods.rtn import RTN
from quantine.runtime.modules import QuantEmbedding, QuantLinear, TiedHead
from quantine.runtime.packed import Packed

OUT, IN = 24, 512
SPEC = QuantSpec(4, 128)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The other device passes for a GPU with programs, which nothing here runs."""
    usual = backend.of

    def of(*tensors: Tensor | None) -> backend.Backend:
        there = any(t is not None and t.device.type == NAME for t in tensors)
        return "triton" if there else usual(*tensors)

    monkeypatch.setattr(backend, "of", of)
    with OtherDevice():
        yield


def module_of(kind: type[Packed] = QuantLinear, spec: QuantSpec = SPEC) -> Packed:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    packed = format_named("dense").pack(RTN()(weight, None, spec))
    return kind("dense", spec, OUT, IN, packed)


def there(module: Packed) -> list[Tensor]:
    """The module's tensors on the other device, those of its matrix included."""
    matrix = module._matrix
    parts = matrix.parts()[0] if isinstance(matrix, UnitMatrix) else []
    held = [*module.buffers(), *tensors_in([part for part in parts if part is not None])]
    return [tensor for tensor in held if tensor.device.type == NAME]


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_gpu_holds_a_matrix_once() -> None:
    module = module_of()
    packed = module.packed_tensors()
    places = [tensor.data_ptr() for tensor in packed.values()]
    module.to(NAME)
    matrix = module.matrix(torch.device(NAME, 0))
    assert isinstance(matrix, UnitMatrix)
    assert matrix.words.device.type == NAME
    # Codes as in the file, statistics in words of 32 bits, and a factor for each row.
    assert nbytes(there(module)) == OUT * IN // 2 + OUT * (IN // 128) * 4 + OUT * 4
    assert [tensor.data_ptr() for tensor in module.packed_tensors().values()] == places
    assert module.matrix() is matrix


def test_one_that_was_loaded_there_leaves() -> None:
    packed = module_of().packed_tensors()
    moved = {name: tensor.to(NAME) for name, tensor in packed.items()}
    module = QuantLinear("dense", SPEC, OUT, IN, moved)
    assert isinstance(module.matrix(), UnitMatrix)
    assert {tensor.device.type for tensor in module.buffers()} == {"cpu"}
    assert all(torch.equal(module.get_buffer(name), packed[name]) for name in packed)
    assert isinstance(module.matrix(), UnitMatrix)


def test_what_is_saved_and_copied_is_what_was_loaded() -> None:
    module = module_of()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to(NAME).matrix(torch.device(NAME, 0))
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        state = one.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
        expected = module_of().dequantize()
        assert torch.equal(one.dequantize(), expected)
        assert torch.equal(one.dequantize(torch.device(NAME, 0)).cpu(), expected)


def test_a_cast_keeps_the_matrix_and_a_move_frees_it() -> None:
    module = module_of().to(NAME)
    matrix = module.matrix(torch.device(NAME, 0))
    module.to(torch.bfloat16).to(NAME)
    assert module.matrix() is matrix
    module.to("cpu")
    assert there(module) == []
    assert not isinstance(module.matrix(), UnitMatrix)


def test_a_matrix_that_has_no_units_stays_as_it_is() -> None:
    module = module_of(spec=QuantSpec(4, 0, cluster_sizes=(500, 12))).to(NAME)
    assert module.matrix(torch.device(NAME, 0)) is None
    assert {tensor.device.type for tensor in module.buffers()} == {NAME}


@pytest.mark.parametrize("outliers", [False, True])
def test_a_table_that_is_the_head_is_there_once(outliers: bool) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    qtensor = RTN()(weight, None, SPEC)
    if outliers:
        qtensor = replace(qtensor, outliers=Csr.where(weight.abs() > 2.5, weight))
    layout = "sparse" if outliers else "dense"
    table: Packed = QuantEmbedding(layout, SPEC, OUT, IN, format_named(layout).pack(qtensor))
    stored = nbytes(list(table.packed_tensors().values()))
    head = TiedHead(table)  # type: ignore[arg-type]
    pair = torch.nn.ModuleList([table, head]).to(NAME)
    assert isinstance(table.matrix(torch.device(NAME, 0)), UnitMatrix)
    arranged = OUT * IN // 2 + OUT * (IN // 128) * 4 + OUT * 4
    held = nbytes([tensor for tensor in there(table) if tensor.numel()])
    assert held >= arranged + stored if outliers else held == arranged
    assert pair[0] is table


def test_rows_are_looked_up_on_the_device() -> None:
    table = module_of(QuantEmbedding).to(NAME)
    expected = module_of(QuantEmbedding)(torch.tensor([3, 3, 0]))
    found = table(torch.tensor([3, 3, 0]).to(NAME))
    assert found.device.type == NAME
    assert torch.equal(found.cpu(), expected)


def test_a_module_that_rounds_is_shown_before_it_runs() -> None:
    module = module_of()
    labels = torch.zeros(IN, dtype=torch.int64)
    module.inputs = StaticGrid(4, torch.tensor([0.1]), torch.tensor([7.0]), labels)
    assert ", integers" in repr(module.to(NAME))
