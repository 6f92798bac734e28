"""What norms do is found by trying them; what is no norm of hidden states is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantine import FamilyError
from quantine.rotation.norms import NormKind, norm_kind

WIDTH = 24


class Norm(nn.Module):
    """Divides by the root mean square, and scales in one of several ways."""

    def __init__(self, way: str = "", width: int = WIDTH) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
        if self.way == "groups":
            normed = nn.functional.rms_norm(x.unflatten(-1, (4, -1)), (WIDTH // 4,)).flatten(-2)
        gain = {"offset": 1 + self.weight, "square": self.weight**2}.get(self.way, self.weight)
        return normed * gain


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (Norm(), NormKind(False, 0)),
        (Norm("offset"), NormKind(False, 1)),
        (nn.RMSNorm(WIDTH, elementwise_affine=False), NormKind(False, 0)),
        (nn.LayerNorm(WIDTH), NormKind(True, 0)),
        (nn.LayerNorm(WIDTH, bias=False), NormKind(True, 0)),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), NormKind(True, 0)),
    ],
)
def test_norms_are_told_apart(norm: Any, kind: NormKind) -> None:
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert norm_kind(norm, "norm", WIDTH) == kind
    assert norm_kind(norm.to("meta"), "norm", WIDTH) == kind
    assert all(bool((value == 1).all()) for name, value in before.items() if name == "weight")


@pytest.mark.parametrize(
    "module",
    [
        Norm("groups"),
        Norm("square"),
        Norm(width=WIDTH // 2),
        nn.Identity(),
        nn.SiLU(),
        nn.GroupNorm(4, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.MultiheadAttention(WIDTH, 2),
    ],
)
def test_others_are_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(FamilyError, match=f"a.place, a {type(module).__name__}, is no norm"):
        norm_kind(module, "a.place", WIDTH)
