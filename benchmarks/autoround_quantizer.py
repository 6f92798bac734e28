"""Run by AutoRound's own Python: its tuned roundings, on the CPU.

python autoround_quantizer.py MODEL SEGMENTS.json OUT BITS GROUP_SIZE ITERATIONS

A directory below OUT gets its codes, scales and zero points in the format of GPTQ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
"""Segments of a step, AutoRound's own default."""


def main() -> None:
    """Quantize the blocks of a float32 model with zero points."""
    source, segments, out, bits, group_size, iterations = sys.argv[1:]
    tokens = torch.tensor(json.loads(Path(segments).read_text(encoding="utf-8")))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    quantizer = AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
        bits=int(bits),
        group_size=int(group_size),
        sym=False,
        iters=int(iterations),
        nsamples=len(rows),
        seqlen=tokens.shape[1],
        batch_size=BATCH,
        dataset=DataLoader(rows, batch_size=BATCH),
        device_map="cpu",
    )
    quantizer.quantize_and_save(out, format="auto_gptq")


if __name__ == "__main__":
    main()
