"""What a calibration run needs, and how it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from quantine.core.device import CPU
from quantine.core.stage_times import StageTimes
from quantine.families.family import Family
from quantine.ranks.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from quantine.source.checkpoint import Checkpoint

TOKENS_PER_BATCH: Final = 2048
"""Largest number of tokens that go through a block at once, unless one segment is longer."""


@dataclass(frozen=True)
class CalibrationSetup:
    """Everything a calibration run needs: model, weights, segments, and how to compute.

    Attributes:
        model: a model from `quantine.calibrate.skeleton.skeleton`; each block gets its weights only
            while it is worked on.
        family: the model's architecture.
        checkpoint: the files that weights are read from.
        segments: ``[samples, seqlen]`` int64 token ids, without padding.
        spill: directory for hidden states; ``None`` keeps them in memory.
        saved: directory that holds hidden states, too, where they are in memory, so that another
            process can go on from them; ``None`` holds none.
        replaced: float32 tensors by name that are used in place of the checkpoint's, outside of
            blocks (such as a quantized embedding).
        bfloat16: multiply matrices in bfloat16, and take statistics, in float32, of the inputs so
            rounded; weights, norms and hidden states stay in float32.
        resumes: let `Sequential.observe_next` continue forward passes where they stopped instead of
            running the block again from its start; takes a few times the memory of the hidden
            states.
        device: device of blocks and hidden states while they are worked on.
        kept_on: device of the hidden states between two blocks, where they are in memory; ``None``
            is ``device``.
        batch_tokens: largest number of tokens that go through a block at once, unless one segment
            is longer.
        shards: number of parts of the segments whose statistics are summed one after another.
        ranks: the processes that share the segments, each some of the shards.
        times: is told what forward passes, Hessians and their factors take.
        token_weights: how much each token of ``segments`` counts in the Hessian of a matrix's
            input, ``[tokens]`` float32 by name of the layer; then each matrix has to be observed
            by itself, and there must be one shard. Empty where all count alike.
    """

    model: PreTrainedModel
    family: Family
    checkpoint: Checkpoint
    segments: Tensor
    spill: Path | None = None
    saved: Path | None = None
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    bfloat16: bool = False
    resumes: bool = False
    device: torch.device = CPU
    kept_on: torch.device | None = None
    batch_tokens: int = TOKENS_PER_BATCH
    shards: int = 1
    ranks: Ranks = ALONE
    times: StageTimes = field(default_factory=StageTimes)
    token_weights: Mapping[str, Tensor] = field(default_factory=dict)

    def autocast(self) -> torch.autocast:
        """A context that sets the precision of matrix products as ``bfloat16`` asks.

        It overrides any autocast context of the caller.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
