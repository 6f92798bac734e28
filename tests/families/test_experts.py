"""Each expert of a mixture becomes a module, and the model computes the same as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from quantine.errors import FamilyError
from quantine.families.derivation.derive import derive
from quantine.families.derivation.expert_groups import check_experts
from quantine.families.derivation.small import randomize, small_config, small_model
from quantine.families.expert_layout import layout_of
from quantine.families.experts import Experts, experts_in, fused_experts, separate
from quantine.families.layers import find_layers
from quantine.survey.specimen import specimen_config

KINDS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "granitemoe",
    "nemotron_h",
    "aria_text",
    "llama4",
    "longcat_flash",
)


def small(kind: str) -> Any:
    model = small_model(specimen_config(kind))
    with torch.no_grad():
        randomize(model)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(1))
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_separate_experts_compute_the_same_from_the_pieces_of_fused_ones(kind: str) -> None:
    model = small(kind)
    fused = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = logits(model)
    separate(model)
    assert not fused_experts(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    found = experts_in(model)
    assert found
    for path, experts in found.items():
        names = {name for name, _ in experts.named_parameters()}
        assert names == {name for name, _ in experts.pieces()}
        for name, piece in experts.pieces():
            whole = fused[f"{path}.{piece.parameter}"]
            assert torch.equal(experts.get_parameter(name), piece.of(whole[piece.expert]))


def counted(experts: nn.Module) -> list[tuple[int, int]]:
    """A list that gets the number of each expert that runs, and how many rows it gets."""
    ran: list[tuple[int, int]] = []
    for number, expert in enumerate(experts.children()):
        expert.register_forward_hook(
            lambda _, x, __, number=number: ran.append((number, len(x[0])))
        )
    return ran


def test_only_chosen_experts_run() -> None:
    model = small("qwen3_moe")
    separate(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, Experts)
    ran = counted(experts)
    chosen, factors = torch.tensor([[3, 1], [3, 1], [1, 0]]), torch.ones(3, 2)
    with torch.no_grad():
        experts(torch.randn(3, 64), chosen, factors)
    assert ran == [(0, 1), (1, 3), (3, 2)]


def test_a_large_mixture_is_found_by_a_small_one() -> None:
    config = AutoConfig.for_model("qwen3_moe", num_experts=40, num_hidden_layers=2)
    family = derive(config)
    groups = family.groups_in(1)
    assert family.experts == ("mlp.experts",)
    assert dict(family.kept) == {"mlp.gate.weight": "it chooses experts"}
    assert groups[2:42] == tuple(
        (f"mlp.experts.{n}.gate_proj", f"mlp.experts.{n}.up_proj") for n in range(40)
    )
    assert groups[42:] == tuple((f"mlp.experts.{n}.down_proj",) for n in range(40))


def test_blocks_without_experts_and_shared_experts_are_as_any_others() -> None:
    family = derive(specimen_config("deepseek_v3"))
    assert family.groups_in(0)[-2:] == (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    last = family.groups_in(2)
    assert ("mlp.experts.3.down_proj",) in last
    assert last[-1] == ("mlp.shared_experts.down_proj",)
    assert dict(derive(specimen_config("qwen2_moe")).kept) == {
        "mlp.gate.weight": "it chooses experts",
        "mlp.shared_expert_gate.weight": "it weighs experts",
    }


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router() -> None:
    config = specimen_config("deepseek_v3")
    config.n_routed_experts = config.num_local_experts = config.moe_intermediate_size = 8
    family = derive(config)
    assert dict(family.kept) == {"mlp.gate.weight": "it chooses experts"}
    assert ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj") in family.groups_in(2)


def test_layers_know_the_experts_beside_them() -> None:
    config = small_config(AutoConfig.for_model("qwen3_moe"), 1)
    model, family = small_model(config), derive(config)
    separate(model)
    layers = {layer.name: layer for layer in find_layers(model, family)}
    inside = "model.layers.0.mlp.experts"
    one, other = layers[f"{inside}.0.up_proj"], layers[f"{inside}.3.up_proj"]
    assert one.experts == inside
    assert one.stage == other.stage != layers[f"{inside}.0.down_proj"].stage
    assert layers["model.layers.0.self_attn.q_proj"].experts == ""


@torch.no_grad()
def test_numbers_behind_all_experts_hand_tokens_back() -> None:
    model = small("longcat_flash")
    separate(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert (len(experts), experts.choices) == (4, 8)
    ran, x = counted(experts), torch.randn(3, 64)
    found = experts(x, torch.tensor([[7, 4], [5, 2], [6, 4]]), torch.tensor([[0.5, 2]] * 3))
    assert ran == [(2, 1)]
    torch.testing.assert_close(found[[0, 2]], 2.5 * x[[0, 2]])
    torch.testing.assert_close(found[1], 0.5 * x[1] + 2 * experts[2](x[1:2])[0])
    assert dict(derive(model.config).kept)["mlp.router.classifier.weight"] == "it chooses experts"


@torch.no_grad()
def test_experts_called_in_turn_run_for_the_tokens_that_chose_them() -> None:
    model = small("llama4")
    separate(model)
    experts = model.get_submodule("model.layers.0.feed_forward.experts")
    ran, x = counted(experts), torch.zeros(4, 3, 64)
    x[0, 1], x[3, :2] = torch.randn(64), torch.randn(2, 64)
    found = experts(x.view(12, 64)).view(4, 3, 64)
    assert ran == [(0, 1), (3, 2)]
    torch.testing.assert_close(found[0, 1], experts[0](x[0, 1:2])[0])
    torch.testing.assert_close(found[3, :2], experts[3](x[3, :2]))
    assert not found[1:3].any()


class Plain(nn.Module):
    """Fused experts that say nothing of themselves.

    Args:
        shapes: those of gates and ups in one parameter, and of the last matrices.
    """

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.ones(shape)) for shape in shapes)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Only the names of the arguments matter."""


@pytest.mark.parametrize(
    ("shapes", "transposed"),
    [
        (((4, 6, 8), (4, 8, 3)), False),
        (((4, 8, 6), (4, 3, 8)), True),
        (((4, 6, 8), (4, 3, 8)), None),
        (((4, 6, 8), (4, 8, 4)), None),
        (((4, 6, 8), (5, 8, 3)), None),
        (((6, 8), (8, 3)), None),
    ],
)
def test_shapes_tell_how_experts_lie(
    shapes: tuple[tuple[int, ...], ...], transposed: bool | None
) -> None:
    layout = layout_of(Plain(*shapes))
    assert (None if layout is None else layout.is_transposed) is transposed


def test_experts_that_compute_otherwise_than_they_look_are_refused_by_name() -> None:
    model = small("longcat_flash")
    fused = model.get_submodule("model.layers.0.mlp.experts")
    fused.register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(FamilyError, match=r"layers\.0\.mlp\.experts computes something else than"):
        check_experts(model, torch.arange(48).view(2, 24))


def test_experts_of_one_matrix_each_are_refused_by_name() -> None:
    with pytest.raises(FamilyError, match=r"jetmoe .*input_linear\.weight \(.*\) in a JetMoePara"):
        derive(specimen_config("jetmoe"))
