"""What quantizing large models takes on a GPU, predicted by `quantine plan`'s arithmetic.

    python benchmarks/gpu_plans.py

prints the table that benchmarks/gpu_page.py puts into docs/gpu.md. Nothing here is measured, and no
weights are needed: models are shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from quantine import Calibration, Plan
from quantine.calibrate.skeleton import skeleton
from quantine.families import described_family
from quantine.families.layers import find_layers
from quantine.run.estimate import WORKSPACE, estimate, residences
from quantine.run.job import Job
from quantine.run.working_set import working_set
from quantine.source.model_source import ModelSource

SHARE = 0.6
"""Share of a GPU's rate that products are taken to reach."""
DISK = 2e9
"""Bytes a second at which weights are taken to be read."""
STORED = 2
"""Bytes of a stored weight."""


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


def job_of(shape: Shape, plan: Plan, calibration: Calibration | None = None) -> Job:
    """The job to quantize a model of ``shape``, with the default calibration if none is given."""
    config = shape.config()
    bare, family = skeleton(config), described_family("llama")
    calibration = calibration or Calibration(seqlen=512)
    segments = torch.zeros(calibration.samples, calibration.seqlen, dtype=torch.int64)
    return Job(
        ModelSource(shape.name, Path()),
        config,
        bare,
        family,
        plan,
        tuple(plan.resolve(find_layers(bare, family))),
        calibration,
        segments,
        None,
        False,
        {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()},
        torch.device("cuda"),
    )


def least_memory(job: Job) -> int:
    """Fewest bytes on the device with which the job is accepted."""
    *_, smallest = residences(job, math.inf)
    return working_set(job, smallest) + WORKSPACE


def seconds(job: Job, rate: float) -> float:
    """Least seconds of the products of a run, or of reading its weights if that takes longer."""
    tokens = 0 if job.segments is None else job.segments.numel()
    operations, groups = 0.0, set()
    weights = 0
    for decision in job.scheme_layers():
        layer = decision.layer
        if layer.block is None:
            continue
        weights += layer.weights
        square = layer.in_features**2
        # A pass over the text; the column loop; errors of the weight and of the output.
        operations += 2.0 * tokens * layer.weights + 5.0 * layer.out_features * square
        if (layer.block, layer.group) not in groups:
            groups.add((layer.block, layer.group))
            operations += tokens * square + layer.in_features * square  # Hessian, factor
    return max(operations / (SHARE * rate), STORED * weights / DISK)


if __name__ == "__main__":
    for line in (head(), *rows()):
        print(" | ".join(line))
