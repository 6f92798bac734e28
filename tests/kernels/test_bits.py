"""Packing of codes: the reference and the native kernel against one long integer per row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import quantine._native as extension
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from quantine.errors import BackendUnavailable, FormatError
from quantine.kernels import backend
from quantine.kernels.bits import pack, unpack
from quantine.kernels.bits.reference import pack_reference, packed_bytes, unpack_reference
from samples import quick

WIDTHS = range(1, 9)


@pytest.fixture(params=["native", "reference"])
def chosen(request: pytest.FixtureRequest, choose: Callable[[str], None]) -> str:
    """Every test that asks for it runs once per backend."""
    choose(request.param)
    return str(request.param)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that sets the backend variable for this test."""

    def set_variable(value: str) -> None:
        monkeypatch.setenv(backend.VARIABLE, value)
        backend.native.cache_clear()

    yield set_variable
    backend.native.cache_clear()


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + 100 * columns + bits)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def native_pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    packed = torch.full((codes.shape[0], packed_bytes(codes.shape[1], bits)), 0xAA).to(torch.uint8)
    extension.pack_bits(codes, packed, bits)
    return packed


def native_unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    codes = torch.full((packed.shape[0], columns), 0xAA).to(torch.uint8)
    extension.unpack_bits(packed, codes, bits)
    return codes


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits, rows, columns = draw(st.integers(1, 8)), draw(st.integers(0, 5)), draw(st.integers(1, 35))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    codes = draw(st.lists(row, min_size=rows, max_size=rows))
    return torch.tensor(codes, dtype=torch.uint8).view(rows, columns), bits


@quick
@given(code_matrices())
def test_every_row_is_the_long_integer_and_comes_back(matrix: tuple[torch.Tensor, int]) -> None:
    codes, bits = matrix
    rows = [oracles.pack_row(row, bits) for row in codes.tolist()]
    for packer, unpacker in (
        (pack_reference, unpack_reference),
        (native_pack, native_unpack),
        (pack, unpack),
    ):
        packed = packer(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape == (codes.shape[0], packed_bytes(codes.shape[1], bits))
        assert [bytes(row) for row in packed.tolist()] == rows
        restored = unpacker(packed, bits, codes.shape[1])
        assert restored.dtype == torch.uint8
        assert torch.equal(restored, codes)


def test_three_bits_by_hand(chosen: str) -> None:
    # 0 to 7 in three bits each, first code in the lowest bits: 0xFAC688, lowest byte first.
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 1]], dtype=torch.uint8)
    packed = pack(codes, 3)
    assert packed.tolist() == [[0x88, 0xC6, 0xFA, 0x01]]
    assert torch.equal(unpack(packed, 3, 9), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_size_is_the_bits_rounded_up_to_bytes(bits: int) -> None:
    for columns in range(70):
        size = packed_bytes(columns, bits)
        assert size * 8 - 7 <= columns * bits <= size * 8


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 1), (1, 8), (2, 63), (257, 65), (2, 0)])
def test_edge_shapes_on_both_backends(chosen: str, rows: int, columns: int, bits: int) -> None:
    codes = random_codes(rows, columns, bits)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_inputs_need_not_be_contiguous(chosen: str, bits: int) -> None:
    whole = random_codes(24, 18, bits)
    for codes in (whole.T, whole[::2, 1::3], whole[3].expand(5, -1)):
        packed = pack(codes, bits)
        assert torch.equal(packed, pack_reference(codes.contiguous(), bits))
        strided = torch.stack([packed, packed], -1)[..., 0]
        assert not strided.is_contiguous()
        assert torch.equal(unpack(strided, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", WIDTHS[:-1])
def test_a_code_that_does_not_fit_is_refused(chosen: str, bits: int) -> None:
    codes = random_codes(3, 10, bits)
    codes[2, 7] = 2**bits
    with pytest.raises(FormatError, match=f"code {2**bits} does not fit into {bits} bits"):
        pack(codes, bits)


def test_packing_leaves_its_input_alone(chosen: str) -> None:
    codes = random_codes(3, 10, 5)
    before = codes.clone()
    unpack(pack(codes, 5), 5, 10)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", [0, 9])
def test_the_extension_refuses_widths_it_does_not_have(bits: int) -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        extension.pack_bits(codes, codes.clone(), bits)


def test_the_extension_refuses_shapes_that_do_not_fit() -> None:
    codes = torch.zeros(2, 9, dtype=torch.uint8)
    for shape in ((2, 3), (2, 5), (1, 4)):
        packed = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(ValueError, match="packed must be"):
            extension.pack_bits(codes, packed, 3)
        with pytest.raises(ValueError, match="packed must be"):
            extension.unpack_bits(packed, codes, 3)


@pytest.mark.parametrize("bits", [3, 8])
def test_unpack_is_a_well_formed_operator(chosen: str, bits: int) -> None:
    packed = pack(random_codes(4, 11, bits), bits)
    torch.library.opcheck(torch.ops.quantine.unpack.default, (packed, bits, 11))


def test_unpack_compiles_into_one_graph(chosen: str) -> None:
    codes = random_codes(4, 11, 3)
    packed = pack(codes, 3)

    def decoded(packed: torch.Tensor) -> torch.Tensor:
        return unpack(packed, 3, 11).float() * 2 + 1

    compiled = torch.compile(decoded, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), codes.float() * 2 + 1)


def test_the_reference_stays_on_the_device_of_its_input() -> None:
    # The meta device stands for any other: mixing it with the CPU is refused just the same.
    packed = pack_reference(torch.empty(2, 9, dtype=torch.uint8, device="meta"), 3)
    assert packed.device.type == "meta"
    assert unpack_reference(packed, 3, 9).device.type == "meta"


class TestBackend:
    def test_names_what_was_chosen(self, chosen: str) -> None:
        assert backend.name() == chosen
        assert (backend.native() is None) == (chosen == "reference")

    def test_auto_is_native_where_the_extension_exists(self, choose: Callable[[str], None]) -> None:
        choose("auto")
        assert backend.native() is extension

    def test_unset_means_auto(
        self, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        choose("reference")
        monkeypatch.delenv(backend.VARIABLE)
        backend.native.cache_clear()
        assert backend.name() == "native"

    @pytest.mark.parametrize("value", ["cuda", "", "Native"])
    def test_unknown_choice_is_refused(self, choose: Callable[[str], None], value: str) -> None:
        choose(value)
        with pytest.raises(BackendUnavailable, match=f"='{value}' is not one of auto, native, ref"):
            backend.native()

    def test_missing_extension_warns_once_and_the_reference_serves(
        self, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        choose("auto")
        monkeypatch.setattr(importlib, "import_module", missing)
        with pytest.warns(RuntimeWarning, match="cannot be loaded"):
            assert backend.native() is None
        assert backend.native() is None  # a second warning would fail this test
        codes = random_codes(2, 9, 3)
        assert torch.equal(unpack(pack(codes, 3), 3, 9), codes)

    def test_missing_extension_is_an_error_when_insisted_on(
        self, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        choose("native")
        monkeypatch.setattr(importlib, "import_module", missing)
        with pytest.raises(BackendUnavailable, match="reinstall quantine"):
            backend.native()


def missing(name: str) -> ModuleType:
    raise ImportError(f"no {name} in this test")
