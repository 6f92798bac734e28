"""What ranks do where there are GPUs, without any: which one is whose, and what sends tensors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from quantine.errors import BackendUnavailable
from quantine.ranks.start import gpu_of_rank, started

TWO_RANKS = """
import os
import sys
import torch
import torch.distributed as dist
from quantine.ranks.start import started

with started("cpu") as (ranks, device):
    ranks._tensors = dist.new_group(backend="gloo")  # as NCCL's is given to ranks on GPUs
    large, small = torch.full((3,), 2.0**25), torch.ones(3)
    own = [[large], [-large]] if ranks.first else [[small]]
    sums = ranks.total(iter(own))
    # In one piece, as the other rank writes to the same pipe.
    line = f"{ranks.index} {device} {sums[0].tolist()} {ranks.gather(ranks.index)}\\n"
    os.write(1, line.encode())
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says that it has two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_rank_of_a_machine_has_a_gpu(
    device: str, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, local in ((0, 0), (1, 1), (2, 0), (3, 1)):  # two machines
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert gpu_of_rank(device, rank) == f"cuda:{local}"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BackendUnavailable, match="rank 5 has no GPU of its own among 2: start"):
        gpu_of_rank(device, 5)


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps"])
def test_a_device_with_a_name_of_its_own_is_that_of_all(device: str, gpus: None) -> None:
    assert gpu_of_rank(device, 0) is None


def test_without_gpus_ranks_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_of_rank("auto", 0) is None


def test_nccl_sends_between_gpus_and_gloo_all_else(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's calls of torch.distributed, which are recorded."""
    made: list[Any] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    names = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**names, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    dist.PrefixStore("ending", joined).set("0", "-1")  # the other one has done its work
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(dist, "init_process_group", lambda kind, **_: made.append(kind))
    monkeypatch.setattr(dist, "new_group", lambda backend, **_: made.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append("end"))
    with started("auto") as (ranks, device):
        assert (ranks.index, ranks.count, device) == (1, 2, "cuda:1")
    assert made == ["gloo", "cuda:1", "nccl", "end"]


def test_sums_go_through_a_group_of_their_own(tmp_path: Path) -> None:
    """The way of NCCL, with gloo's group in its place: the order of additions stays."""
    program = tmp_path / "ranks.py"
    program.write_text(TWO_RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--standalone", str(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # In float32, 1 would be lost beside 2**25.
    lines = sorted(done.stdout.splitlines())
    assert lines == [f"{rank} cpu [1.0, 1.0, 1.0] [0, 1]" for rank in range(2)]
