"""Run by llm-compressor's own Python: its GPTQ, on the CPU.

python llm_compressor_quantizer.py MODEL SEGMENTS.json OUT BITS GROUP_SIZE SYMMETRIC
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantize the blocks of a float32 model, in activation order with static groups."""
    source, segments, out, bits, group_size, symmetric = sys.argv[1:]
    tokens = json.loads(Path(segments).read_text(encoding="utf-8"))
    masks = [[1] * len(segment) for segment in tokens]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = QuantizationArgs(
        num_bits=int(bits),
        group_size=int(group_size),
        symmetric=symmetric == "True",
        strategy="group",
        actorder="static",
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": masks}),
        recipe=GPTQModifier(config_groups={"blocks": scheme}, ignore=["lm_head"]),
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    model.half()  # scales are float16 in files
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main()
