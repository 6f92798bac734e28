"""Texts that a model and its reference write after the same prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from quantine.calibrate.text import BUILTIN, read_text
from quantine.calibrate.token_stream import token_stream
from quantine.core.ambient import own_state
from quantine.errors import BackendUnavailable
from quantine.runtime.decoder import Decoder, decoder_for
from quantine.runtime.generate import continue_tokens
from quantine.runtime.packed import packed_modules
from quantine.runtime.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS: Final = (16, 128, 512)
"""Lengths of the prompts in tokens; those that do not fit the model's context are left out."""
WRITTEN: Final = 40
"""Number of tokens written after each prompt, always the most likely one."""


@own_state()
def decode_samples(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: Any
) -> list[dict[str, Any]]:
    """Continue the held-out part of the built-in text with both models.

    Args:
        model: the quantized model.
        reference: the float model.
        tokenizer: the tokenizer of both.

    Returns:
        For each prompt its length ``prompt_tokens`` and text ``prompt``, the texts that
        ``reference`` and ``model`` write, and ``same``, the number of tokens before they first
        differ.
    """
    text = read_text(BUILTIN, "heldout")
    stream = token_stream(tokenizer, text, model.config.vocab_size, BUILTIN)
    longest = getattr(model.config, "max_position_embeddings", None) or max(PROMPTS) + WRITTEN
    samples = []
    for length in PROMPTS:
        if length + WRITTEN > longest:
            continue
        (prompt,) = stream.pieces([0], length)
        own, other = _written(model, prompt), _written(reference, prompt)
        pairs = zip(own, other, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(own), len(other)))
        samples.append(
            {
                "prompt_tokens": length,
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "reference": tokenizer.decode(other, skip_special_tokens=True),
                "model": tokenizer.decode(own, skip_special_tokens=True),
                "same": same,
            }
        )
    return samples


def _written(model: PreTrainedModel, prompt: Tensor) -> list[int]:
    decoder: Decoder | None = None
    if any(packed_modules(model)):
        try:
            decoder = decoder_for(model, len(prompt) + WRITTEN)
        except BackendUnavailable:
            decoder = None  # the modules of transformers compute the same
    ids = prompt.unsqueeze(0)
    return list(continue_tokens(model, ids, WRITTEN, Sampling(), decoder))
