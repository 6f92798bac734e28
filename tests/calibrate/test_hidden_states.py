"""Hidden states between two blocks, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

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


def saved(directory: Path, enters: int = 2, in_memory: bool = True) -> list[torch.Tensor]:
    """Two batches that an earlier process left, the second still one block behind."""
    kept, values = HiddenStates(2, directory, in_memory=in_memory), batches(2)
    kept.put(0, values[0], enters)
    kept.put(1, values[1], enters - 1)
    return values


@pytest.mark.parametrize("in_memory", [True, False])
def test_another_process_goes_on_from_files(in_memory: bool, tmp_path: Path) -> None:
    values = saved(tmp_path, in_memory=in_memory)
    again = HiddenStates(2, tmp_path, in_memory=in_memory)
    assert again.restore([2, 2], values[0], done=2) is None
    assert [again.enters(0), again.enters(1)] == [2, 1]
    assert all(torch.equal(again[index], values[index]) for index in range(2))


def flip(path: Path) -> None:
    """Change the last bit of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(save({"hidden": torch.ones(2, 3, 5)})),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_not_taken_over(damage: Callable[[Path], object], tmp_path: Path) -> None:
    values = saved(tmp_path)
    damage(tmp_path / "000001.safetensors")
    said = HiddenStates(2, tmp_path).restore([2, 2], values[0], done=2)
    assert said == "are damaged (000001.safetensors)"


def test_what_does_not_fit_the_run_is_not_taken_over(tmp_path: Path) -> None:
    values = saved(tmp_path)
    again = HiddenStates(2, tmp_path)
    assert "enter block 2, but 1 " in str(again.restore([2, 2], values[0], done=1))
    assert "another shape" in str(again.restore([2, 1], values[0], done=2))
    assert "another shape" in str(again.restore([2, 2], values[0][..., :4], done=2))
    assert "another shape" in str(again.restore([2, 2], values[0].double(), done=2))
    assert HiddenStates(3, tmp_path).restore([2, 2, 2], values[0], done=2) == "are missing"


def test_a_write_that_is_cut_short_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = saved(tmp_path)
    kept = HiddenStates(2, tmp_path, in_memory=True)

    def killed(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.put(0, values[1], 3)
    assert HiddenStates(2, tmp_path).restore([2, 2], values[0], done=2) is None


def test_what_was_never_stored_is_an_error(directory: Path | None) -> None:
    with pytest.raises((IndexError, FileNotFoundError)):
        HiddenStates(2, directory)[1]
