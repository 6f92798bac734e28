"""Memory from the configuration, against hand computation and against a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantine.errors import PlanError
from quantine.eval.footprint import footprints
from quantine.source.locate import locate
from tiny_models import FAMILIES


def test_opt_66b_saves_more_than_900_gb() -> None:
    found = {one.scheme: one for one in footprints("opt-66b", 64, 8192, ["W4A16", "W4A4"])}
    keys_and_values = 2 * 64 * 64 * 8192 * 9216 * 2
    assert found["W4A16"].cache == keys_and_values
    assert found["W4A4"].cache == keys_and_values // 4
    # Queries, keys and values rounded in turn: 128 halves for each of their channels.
    assert found["W4A4"].weights - found["W4A16"].weights == 64 * 3 * 9216 * 128 * 2
    assert found["W4A16"].total - found["W4A4"].total > 900e9
    # 12 h^2 numbers in a block; tables, norms and biases in 16 bit; below 2% of statistics.
    matrices, tables = 12 * 64 * 9216**2 / 2, (50272 + 2050) * 9216 * 2
    assert matrices + tables < found["W4A4"].weights < 1.03 * (matrices + tables)


def test_factors_of_values_take_memory() -> None:
    found = footprints("opt-66b", 64, 8192, ["W4A4KV", "W4A4KV-rotated-mixed"])
    assert found[1].cache - found[0].cache == 64 * 72 * 64 * 8192 * 2


def test_temporary_activations_by_hand() -> None:
    (floats, rounded) = footprints("opt-13b", 2, 10, ["W16A16", "W4A4"])
    # Stream, norm output and hidden channels of the MLP: 1 + 1 + 4 widths of 16 bit.
    assert floats.temporary == 20 * 5120 * 6 * 2
    # 16 bit stream twice, while the MLP's output is written, and 4 widths at 4 bit.
    assert rounded.temporary == 20 * 5120 * (2 + 2 + 4 * 0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_footprint(name: str, tiny: Callable[[str], Path]) -> None:
    (floats, eight, four) = footprints(str(tiny(name)), 1, 32, ["W16A16", "W8A8", "W4A4"])
    assert floats.weights * 2 == locate(tiny(name)).weight_bytes() - _header(tiny(name))
    assert floats.cache > eight.cache > four.cache > 0
    assert floats.temporary > eight.temporary > four.temporary > 0


@pytest.mark.parametrize(
    ("batch", "seqlen", "scheme"), [(0, 1, "W4A4"), (1, 0, "W4A4"), (1, 1, "4")]
)
def test_nonsense_is_refused(batch: int, seqlen: int, scheme: str) -> None:
    with pytest.raises(PlanError):
        footprints("opt-13b", batch, seqlen, [scheme])


def _header(directory: Path) -> int:
    """Bytes of a weight file before its tensors."""
    with (directory / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
