"""Positions of the keys that attention sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantine.activations.centred_keys import CentredKeys, check_from_first, positions_of
from quantine.errors import FamilyError, FormatError


def hidden(*rows: list[int]) -> Tensor:
    """The mask ``[batch, 1, 1, context]`` of a query that sees the tokens with 1."""
    return (1 - torch.tensor(rows).float())[:, None, None] * torch.finfo(torch.float32).min


def test_what_is_told_counts_for_a_whole_text() -> None:
    told = torch.tensor([[1, 1, 0, 1]])
    assert torch.equal(positions_of(4, None, told), told)


def test_tokens_before_follow_each_other() -> None:
    assert positions_of(5, None, torch.tensor([[3, 4]])).tolist() == [[0, 1, 2, 3, 4]]
    # Two tokens of padding before the second text; room behind both.
    mask = hidden([1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0])
    found = positions_of(6, mask, torch.tensor([[3], [1]]))
    assert found[0, :4].tolist() == [0, 1, 2, 3]
    assert found[1, 2:4].tolist() == [0, 1]
    # A window that has moved on.
    assert positions_of(3, hidden([0, 1, 1]), torch.tensor([[9]])).tolist() == [[7, 8, 9]]


def test_packed_keys_begin_at_the_first_position() -> None:
    check_from_first(4, None, torch.tensor([[3]]))
    check_from_first(6, hidden([1, 1, 1, 0, 0, 0]), torch.tensor([[2]]))
    with pytest.raises(RuntimeError, match="without padding before them"):
        check_from_first(4, hidden([1, 1, 1, 1], [0, 1, 1, 1]), torch.tensor([[3], [2]]))


@pytest.mark.parametrize("told", [None, torch.zeros(3, 1, 4, dtype=torch.int64)])
def test_a_model_that_does_not_tell_is_refused(told: Tensor | None) -> None:
    for check in (positions_of, check_from_first):
        with pytest.raises(FamilyError, match="leave out -centred"):
            check(4, None, told)


def test_damaged_tensors_are_refused() -> None:
    good = torch.ones(8)
    CentredKeys(good, good, good, good).check("block.centre", 8)
    with pytest.raises(FormatError, match=r"block.centre.sin is torch.float32 \[7\]"):
        CentredKeys(good, good, good[:7], good).check("block.centre", 8)
    with pytest.raises(FormatError, match=r"block.centre.turns holds values that are not finite"):
        CentredKeys(good, good, good, good / 0).check("block.centre", 8)
