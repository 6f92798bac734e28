"""Small tokenizers of SentencePiece's kind."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

LEARNED = [
    "the quick brown fox jumps over the lazy dog, and the other dogs jump over the fox",
    "there and then, they that were there thought otherwise; nothing more was said of it",
    "naïve café 12 345 日本語 the  theme   of  theatres\n\nis there\tan answer? aaaa aaaaa",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
SPACES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def sentencepiece(words: int = 420) -> Any:
    """A tokenizer as transformers' converter makes it: merges in all ways, words for bytes."""
    learner = Tokenizer(BPE())
    learner.normalizer = SPACES
    first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=words, special_tokens=first, show_progress=False)
    learner.train_from_iterator(LEARNED * 4, trainer)
    vocabulary = learner.get_vocab()
    scores = {word: -float(number) for word, number in vocabulary.items()}
    merges = generate_merges(vocabulary, scores, skip_tokens=first)
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = SPACES
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def with_metaspace(tokenizer: Any) -> Any:
    """The same as transformers' own class for llama has it: a splitter instead of a normalizer."""
    found = json.loads(tokenizer.to_str())
    found["normalizer"] = None
    changed = Tokenizer.from_str(json.dumps(found))
    changed.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    return changed


def for_transformers(tokenizer: Any) -> Any:
    """The tokenizer as transformers has it."""
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
