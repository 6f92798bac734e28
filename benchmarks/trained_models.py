"""Small models that are trained here, where no real one has the shape that a comparison needs.

    python benchmarks/trained_models.py OUT wikitext2_train_raw_5k.txt --seconds 600

OUT is a llama whose rows are all multiples of 256, as the K types of llama.cpp want them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

BATCH: Final = 8
LENGTH: Final = 128
RATE: Final = 3e-3
WORDS: Final = 1024
SIZES: Final = {
    "vocab_size": WORDS,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Train the llama."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = word_tokenizer(arguments.text)
    fit(model, tokenizer, arguments.text, arguments.seconds)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def word_tokenizer(text: Path) -> Any:
    """A byte-level BPE of `WORDS` words, learned from ``text``."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=letters, show_progress=False)
    tokenizer.train([str(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def fit(model: Any, tokenizer: Any, text: Path, seconds: float, **options: Any) -> None:
    """Train a model on ``text`` for a while; ``options`` are of its forward."""
    data = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    started, steps, share = time.perf_counter(), 0, 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps + 1) / 50) * (1 - share)
        starts = torch.randint(0, len(data) - LENGTH, (BATCH,))
        tokens = torch.stack([data[start : start + LENGTH] for start in starts])
        loss = model(input_ids=tokens, labels=tokens, **options).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        share = (time.perf_counter() - started) / seconds
        if steps % 50 == 0:
            print(f"step {steps}: loss {loss.item():.3f}, {share:.0%} of the time", flush=True)


if __name__ == "__main__":
    main()
