"""Positions of the keys that attention sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    # Padding behind the second text, before what it went on with.
    mask = hidden([1, 1, 1, 1, 1], [1, 1, 0, 0, 1])
    found = positions_of(5, mask, torch.tensor([[4], [2]]))
    assert found[0].tolist() == [0, 1, 2, 3, 4]
    assert found[1, [0, 1, 4]].tolist() == [0, 1, 2]
    # A window that has moved on.
    assert positions_of(3, hidden([0, 1, 1]), torch.tensor([[9]]))[0, 1:].tolist() == [8, 9]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 3)), max_size=3),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_padding_anywhere_does_not_count(
    earlier: list[tuple[int, int, int]], tokens: int, room: int
) -> None:
    # Earlier calls had padding, tokens, and padding again; this one has none.
    real = [flag for a, b, c in earlier for flag in (0,) * a + (1,) * b + (0,) * c]
    count, context = sum(real), len(real) + tokens + room
    rows = [[*real, *[1] * (i + 1), *[0] * (tokens - 1 - i + room)] for i in range(tokens)]
    mask = hidden(*rows).transpose(0, 2)
    told = count + torch.arange(tokens)[None]
    found = positions_of(context, mask, told)[0]
    kept = torch.tensor([*map(bool, real), *[True] * tokens, *[False] * room])
    assert found[kept].tolist() == list(range(count + tokens))


def test_packed_keys_begin_at_the_first_position() -> None:
    check_from_first(4, None, torch.tensor([[3]]))
    check_from_first(6, hidden([1, 1, 1, 0, 0, 0]), torch.tensor([[2]]))
    causal = torch.ones(4, 4).tril()
    # Padding behind a text, whose positions may be anything.
    behind = causal * torch.tensor([1, 1, 0, 0])
    check_from_first(4, hidden(*behind.tolist()).transpose(0, 2), torch.tensor([[0, 1, 1, 1]]))
    before = hidden(*(causal * torch.tensor([0, 1, 1, 1])).tolist()).transpose(0, 2)
    for context, mask, told in (
        (4, hidden([1, 1, 1, 1], [0, 1, 1, 1]), [[3], [2]]),
        (4, before, [[0, 0, 1, 2]]),
        (4, before, [[0, 1, 2, 3]]),
        (4, None, [[0, 1, 7, 3]]),
        (6, None, [[0, 1, 2, 3]]),
    ):
        with pytest.raises(RuntimeError, match="without padding before them"):
            check_from_first(context, mask, torch.tensor(told))


@pytest.mark.parametrize("told", [None, torch.zeros(3, 1, 4, dtype=torch.int64)])
def test_a_model_that_does_not_tell_is_refused(told: Tensor | None) -> None:
    for check in (positions_of, check_from_first):
        with pytest.raises(FamilyError, match="leave out -centred"):
            check(4, None, told)


def test_damaged_tensors_are_refused() -> None:
    good = torch.ones(8)
    CentredKeys(good, good, good, good).check("block.centre", 2, 4)
    for tensors, said in (
        ((good, good, good[:7], good), r"block.centre.sin is torch.float32 \[7\]"),
        ((good, good, good, good / 0), r"block.centre.turns holds values that are not finite"),
        ((good, good * 3e38, good, good), r"block.centre.cos has values from 3e\+38"),
        ((good, good, good, good * 4), r"block.centre.turns has values from 4 to 4"),
        ((good, good, good, torch.arange(8) / 8), r"block.centre.turns differs from head to head"),
    ):
        with pytest.raises(FormatError, match=said):
            CentredKeys(*tensors).check("block.centre", 2, 4)
