"""A matrix is what its layer's accessors read, write and observe, wherever it is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantine.errors import FamilyError
from quantine.families.layers import Layer

EXPERTS, OUT, IN = 3, 8, 6


class Fused(nn.Module):
    """Experts in one parameter, gate above up, and a plain and a transposed matrix."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(EXPERTS, 2 * OUT, IN, generator=generator)
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(weight)
        self.linear = nn.Linear(IN, OUT, bias=False)
        self.conv = Conv1D(OUT, IN)


def layers() -> dict[str, Layer]:
    fused = {"module": "experts", "parameter": "gate_up", "index": (1,)}
    return {
        "linear": Layer("linear", OUT, IN, "block", 0, 0),
        "conv": Layer("conv", OUT, IN, "block", 0, 0, transposed=True),
        "gate": Layer("experts.1.gate", OUT, IN, "block", 0, 0, rows=(0, OUT), **fused),
        "up": Layer("experts.1.up", OUT, IN, "block", 0, 0, rows=(OUT, 2 * OUT), **fused),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("which", ["linear", "conv", "gate", "up"])
def test_what_is_written_is_read_and_nothing_else_changes(which: str) -> None:
    model, layer = Fused(), layers()[which]
    before = values(model)
    weight = torch.arange(OUT * IN, dtype=torch.float32).view(OUT, IN)
    layer.write(model, weight)
    assert torch.equal(layer.read(model), weight)
    assert layer.read(model).is_contiguous()
    for name, other in layers().items():
        if name != which:
            assert torch.equal(other.read(model), other.part_of(before[other.stored_name]))
    after = values(model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [layer.stored_name]
    assert int((before[layer.stored_name] != after[layer.stored_name]).sum()) <= OUT * IN
    assert after[layer.stored_name].shape == before[layer.stored_name].shape


def test_a_slice_is_where_it_is_stored() -> None:
    model = Fused()
    stored = model.experts.get_parameter("gate_up").detach()
    assert torch.equal(layers()["gate"].read(model), stored[1, :OUT])
    assert torch.equal(layers()["up"].read(model), stored[1, OUT:])
    assert torch.equal(layers()["conv"].read(model), model.conv.weight.detach().T)


def test_reading_gives_a_copy() -> None:
    model, layer = Fused(), layers()["up"]
    layer.read(model).zero_()
    assert float(layer.read(model).abs().min()) > 0


def test_outputs_of_some_rows_are_seen_alone() -> None:
    model = Fused()
    some = Layer("linear.some", 3, IN, "block", 0, 0, module="linear", rows=(2, 5))
    seen: list[Tensor] = []
    some.observe_outputs(model, seen.append)
    out = model.linear(torch.randn(4, IN))
    assert torch.equal(seen[0], out[:, 2:5])
    with pytest.raises(FamilyError, match=r"experts\.1\.up has no output of its own"):
        layers()["up"].observe_outputs(model, seen.append)


def test_an_observer_sees_inputs_as_they_are_multiplied() -> None:
    model, layer = Fused(), layers()["linear"]
    seen: list[Tensor] = []
    x = torch.randn(2, 5, IN)
    handle = layer.observe(model, seen.append)
    model.linear(x)
    model.linear.inputs = nn.Hardtanh()  # what rounds inputs has this name
    model.linear(x)
    handle.remove()
    model.linear(x)
    assert len(seen) == 2
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], x.clamp(-1, 1))
