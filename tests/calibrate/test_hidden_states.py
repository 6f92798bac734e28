"""Hidden states between two blocks, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantine.calibrate.hidden_states import HiddenStates


@pytest.fixture(params=["memory", "disk"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "new" / "activations" if request.param == "disk" else None


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, generator=generator) for _ in range(count)]


def test_batches_come_back_bit_for_bit_and_can_be_replaced(directory: Path | None) -> None:
    kept, values = HiddenStates(3, directory), batches(6)
    assert len(kept) == 3
    for index in range(3):
        kept[index] = values[index]
    assert all(torch.equal(kept[index], values[index]) for index in range(3))
    kept[1] = values[4]
    assert torch.equal(kept[0], values[0])
    assert torch.equal(kept[1], values[4])
    assert kept[1].dtype == torch.float32


def test_transposed_batches_come_back(directory: Path | None) -> None:
    kept, value = HiddenStates(1, directory), batches(1)[0].transpose(1, 2)
    kept[0] = value
    assert torch.equal(kept[0], value)


def test_spilled_batches_are_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    kept, values = HiddenStates(2, tmp_path), batches(2)
    kept[0], kept[1] = values
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert all(file.stat().st_size >= values[0].nbytes for file in files)
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        kept[0]
    kept[1] = values[0]  # replacing does not add files
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_never_stored_is_an_error(directory: Path | None) -> None:
    with pytest.raises((IndexError, FileNotFoundError)):
        HiddenStates(2, directory)[1]
