"""What quantizing large models takes on a GPU, predicted by `quantine plan`'s arithmetic.

    python benchmarks/gpu_plans.py

prints the table that benchmarks/gpu_page.py puts into docs/gpu.md. Nothing here is measured, and no
weights are needed: models are shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from quantine import Calibration, Plan
from quantine.calibrate.skeleton import skeleton
from quantine.families import described_family
from quantine.families.layers import find_layers
from quantine.run.estimate import estimate
from quantine.run.job import Job
from quantine.run.peak import device_bytes
from quantine.run.residence import residences
from quantine.source.model_source import ModelSource
from quantine.source.tensor_files import Header, Part

SHARE = 0.6
"""Share of a GPU's rate that products are taken to reach."""
DISK = 2e9
"""Bytes a second at which weights are taken to be read."""
STORED = 2
"""Bytes of a stored weight."""
DEFAULT_SEGMENTS = (64, 512)
"""Segments of the calibration, and tokens of each, where nothing else is asked for."""

Matrix = tuple[int, int, str]
"""Outputs and inputs of a matrix, and the name of its input."""


@dataclass(frozen=True)
class Shape:
    """A model of Llama's architecture: layers, width, width inside of the MLP, heads, KV heads."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    shared: int

    def config(self) -> LlamaConfig:
        """Its configuration."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.shared,
            vocab_size=128256,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            dtype=torch.bfloat16,
        )


SHAPES = (
    Shape("1B", 16, 2048, 8192, 32, 8),
    Shape("8B", 32, 4096, 14336, 32, 8),
    Shape("70B", 80, 8192, 28672, 64, 8),
)
PLANS = (
    ("GPTQ, 4 bits", Plan.preset("gptq", bits=4)),
    ("SpQR, 3 bits", Plan.preset("spqr", bits=3)),
    ("budget of 3.5 bits", Plan.budget(3.5)),
)
FLOAT32 = {"A100": 19.5e12, "H100": 67e12, "RTX 4090": 82.6e12}
"""Operations a second in float32, without tensor cores, by the makers' data sheets."""


def head() -> list[str]:
    """The head of the table."""
    found = ["model", "plan", "GB with all on the GPU", "least GB"]
    return found + [f"seconds of products, {name}" for name in FLOAT32]


def rows() -> Iterator[list[str]]:
    """A row for each shape and plan."""
    for shape in SHAPES:
        for name, plan in PLANS:
            job = job_of(shape, plan)
            most, least = estimate(job).device_memory, least_memory(job)
            assert most is not None
            cells = [shape.name, name, f"{most / 1e9:.1f}", f"{least / 1e9:.1f}"]
            yield cells + [f"{seconds(job, rate):.0f}" for rate in FLOAT32.values()]


class NoFiles:
    """What stands for the files of a model that is only a shape."""

    directory = Path()
    headers: Mapping[str, Header] = {}

    def read(self, wanted: Sequence[tuple[str, Part]]) -> list[torch.Tensor]:
        """Nothing can be read."""
        raise NotImplementedError


def job_of(
    shape: Shape,
    plan: Plan,
    segments: tuple[int, int] = DEFAULT_SEGMENTS,
    device: str = "cuda",
) -> Job:
    """The job to quantize a model of ``shape``.

    Args:
        shape: of the model.
        plan: what is done to it.
        segments: of the calibration, their number and length.
        device: where it would run.
    """
    config = shape.config()
    bare, family = skeleton(config), described_family("llama")
    return Job(
        ModelSource(shape.name, Path()),
        NoFiles(),
        config,
        bare,
        family,
        plan,
        tuple(plan.resolve(find_layers(bare, family))),
        Calibration(samples=segments[0], seqlen=segments[1]),
        torch.zeros(segments, dtype=torch.int64),
        None,
        False,
        {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()},
        torch.device(device),
    )


def least_memory(job: Job) -> int:
    """Fewest bytes on the device with which the job is accepted."""
    *_, smallest = residences(job)
    found = device_bytes(job, smallest)
    assert found is not None
    return found


def seconds(job: Job, rate: float, ranks: int = 1) -> float:
    """Least seconds of the products of a run, or of reading its weights if that takes longer.

    Args:
        job: the request.
        rate: operations a second of a device.
        ranks: number of devices that share the run.
    """
    blocks: dict[int, list[Matrix]] = {}
    for decision in job.scheme_layers():
        layer = decision.layer
        if layer.block is not None:
            matrix = layer.out_features, layer.in_features, str(layer.group)
            blocks.setdefault(layer.block, []).append(matrix)
    tokens = 0 if job.segments is None else job.segments.numel()
    found = sum(operations(block, tokens, ranks) for block in blocks.values())
    weights = sum(rows * columns for block in blocks.values() for rows, columns, _ in block)
    return max(found / (SHARE * rate), STORED * weights / DISK)


def operations(matrices: Iterable[Matrix], tokens: int, ranks: int = 1) -> float:
    """Operations of the products of a block, one after another, if ``ranks`` share it.

    They share the text; of the matrices with one input each solves every so many-th.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for rows, columns, group in matrices:
        groups.setdefault((group, columns), []).append(rows)
    found = 0.0
    for (_, columns), rows in groups.items():
        found += tokens * columns * (2.0 * sum(rows) + columns) / ranks  # passes, Hessian
        found += columns**3  # factor
        # The column loop; errors of the weight and of the output.
        found += 5.0 * columns**2 * sum(sorted(rows, reverse=True)[::ranks])
    return found


if __name__ == "__main__":
    for line in (head(), *rows()):
        print(" | ".join(line))
