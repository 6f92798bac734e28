"""Generating text with a model, token by token, and several texts together."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from quantine.core.ambient import own_state
from quantine.core.device import CPU, device_named
from quantine.errors import BackendUnavailable, PlanError
from quantine.runtime.decoder import Batch, Decoder, batch_for, decoder_for
from quantine.runtime.generate_texts import TOGETHER, continue_together
from quantine.runtime.graph_decoder import StaticDecoder, graph_decoder_for
from quantine.runtime.load import load_model
from quantine.runtime.packed import packed_modules
from quantine.runtime.prompt import Transcript, conversation_ids, text_ids
from quantine.runtime.prompt_lookup import most_likely_tokens
from quantine.runtime.sampling import Sampler, Sampling
from quantine.source.locate import locate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

SEPARATOR: Final = "---"
"""The line between texts after several prompts."""


def stream(
    model: str | Path,
    prompts: Sequence[str],
    *,
    tokens: int,
    chat: bool,
    temperature: float,
    seed: int,
    dtype: torch.dtype,
    out: IO[str],
    log: IO[str],
    device: str | torch.device = "cpu",
) -> None:
    """Generate a continuation of each prompt and write it to ``out``.

    That of a single prompt is written as it is made. Those of several are made together and written
    in order, with a line `SEPARATOR` between them.

    Args:
        model: a float or quantized model, as for `quantine.source.locate.locate`.
        prompts: the texts to continue.
        tokens: largest number of tokens to generate for each.
        chat: whether to wrap prompts in the tokenizer's chat template.
        temperature: divisor of logits before sampling; 0 always takes the most likely token.
        seed: seed of a local random generator.
        dtype: dtype of activations and of weights that are not quantized.
        out: where the text goes.
        log: where the speed goes, and why no decoder of quantine's is used if none is.
        device: device of the model, by PyTorch's name.

    Raises:
        BackendUnavailable: there is no such device.
        CalibrationError: the tokenizer cannot read a prompt, or belongs to another model.
        PlanError: a prompt is empty, too long for the model, or an option is out of range.
        CheckpointError, FormatError: the model cannot be read.
    """
    if tokens < 1:
        raise PlanError(f"tokens must be positive, not {tokens}")
    sampling = Sampling(temperature, seed=seed)
    where = device_named(device)
    source = locate(model)
    tokenizer = source.tokenizer()
    config = source.config().get_text_config()
    ids = [_prompt_ids(tokenizer, prompt, chat, config.vocab_size) for prompt in prompts]
    longest = max(one.shape[1] for one in ids)
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and longest + tokens > room:
        raise PlanError(
            f"{longest} prompt tokens and {tokens} new ones exceed the model's context of "
            f"{room}: ask for fewer"
        )
    loaded = load_model(source, dtype, where)
    started = first = time.perf_counter()
    transcripts = [Transcript(tokenizer, one[0].tolist()) for one in ids]
    texts = [""] * len(ids)
    count = 0
    for place, token in _continue_all(loaded, ids, tokens, sampling, log):
        if not count:
            first = time.perf_counter()
        count += 1
        texts[place] += (added := transcripts[place].add(token))
        if len(ids) == 1:
            out.write(added)
            out.flush()
    rests = [transcript.rest() for transcript in transcripts]
    texts = [text + rest for text, rest in zip(texts, rests, strict=True)]
    out.write((rests[0] if len(ids) == 1 else f"\n{SEPARATOR}\n".join(texts)) + "\n")
    decoding = time.perf_counter() - first
    speed = f", {(count - 1) / decoding:.1f} tokens/s" if count > 1 else ""
    read = sum(one.shape[1] for one in ids)
    log.write(f"{read} prompt tokens in {first - started:.2f} s{speed}\n")


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool, vocabulary: int) -> Tensor:
    if chat:
        return conversation_ids(tokenizer, [{"role": "user", "content": prompt}], vocabulary)
    return text_ids(tokenizer, prompt, vocabulary)


def _continue_all(
    model: PreTrainedModel, prompts: list[Tensor], tokens: int, sampling: Sampling, log: IO[str]
) -> Iterator[tuple[int, int]]:
    """The place of a prompt, and the next token after it, as they are made."""
    capacity = max(ids.shape[1] for ids in prompts) + tokens
    several = len(prompts) > 1 and model.device.type != "cuda"
    batch = batch_on(model, capacity, min(len(prompts), TOGETHER), log) if several else None
    if batch is not None:
        rows = [ids[0] for ids in prompts]
        yield from continue_together(batch, rows, tokens, sampling, end_tokens(model))
        return
    decoder = None if several else decoder_on(model, capacity, log)
    for place, ids in enumerate(prompts):
        if decoder is not None:
            decoder.reset()
        for token in continue_tokens(model, ids, tokens, sampling, decoder):
            yield place, token


def continue_tokens(
    model: PreTrainedModel,
    ids: Tensor,
    tokens: int,
    sampling: Sampling,
    decoder: Decoder | StaticDecoder | ModuleDecoder | None = None,
) -> Iterator[int]:
    """Generate token ids after a prompt, up to an end token, which is left out.

    Args:
        model: the model.
        ids: ``[1, n]`` int64 token ids of the prompt, on the CPU wherever ``model`` is.
        tokens: largest number of tokens to generate.
        sampling: how they are chosen.
        decoder: a decoder of ``model`` that has seen no tokens; ``None`` runs the modules of
            ``model``.
    """
    if isinstance(decoder, Decoder) and sampling.temperature == 0:
        made = most_likely_tokens(decoder, ids[0], tokens)
    else:
        made = _one_by_one(decoder or ModuleDecoder(model), ids[0], tokens, Sampler(sampling))
    ends = end_tokens(model)
    yield from itertools.takewhile(lambda token: token not in ends, made)


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Token ids that end a text of ``model``."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def _one_by_one(
    decoder: Decoder | StaticDecoder | ModuleDecoder, prompt: Tensor, count: int, sampler: Sampler
) -> Iterator[int]:
    step = prompt
    for _ in range(count):
        token = sampler.choose(decoder.append(step))
        yield token
        step = torch.tensor([token], dtype=torch.int64, device=prompt.device)


class ModuleDecoder:
    """The interface of `Decoder` for any model, computed by its modules in transformers.

    A model that has no cache of keys and values, such as Mamba, reads its text anew each time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Forget all tokens seen, so that a new text can begin."""
        self._cache: Any = None
        self._unkept = torch.empty(0, dtype=torch.int64, device=CPU)

    @own_state()
    def append(self, tokens: Tensor) -> Tensor:
        """Run the model on further tokens.

        Args:
            tokens: ``[n]`` int64 token ids, on the CPU wherever the model is.

        Returns:
            Logits ``[vocabulary]`` float32 for the token after the last one.
        """
        text = torch.cat([self._unkept, tokens])
        output = self._model(
            input_ids=text.unsqueeze(0).to(self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = getattr(output, "past_key_values", None)
        self._unkept = text[:0] if self._cache is not None else text
        logits: Tensor = output.logits[0, -1].float().cpu()
        return logits


def decoder_on(
    model: PreTrainedModel, capacity: int, log: IO[str]
) -> Decoder | StaticDecoder | None:
    """The fastest decoder for ``model`` on its device; ``None`` where that is its modules.

    Args:
        capacity: largest number of tokens it will see, prompt included.
        log: where the reason goes, if it is ``None`` though there are others for the device.
    """
    with _saying_why(log):
        if model.device.type == "cuda":
            return graph_decoder_for(model, capacity)
        if _decodes_natively(model):
            return decoder_for(model, capacity)
    return None


def batch_on(model: PreTrainedModel, capacity: int, texts: int, log: IO[str]) -> Batch | None:
    """A native decoder of several texts; ``None`` where ``model`` has none on its device.

    Args:
        capacity: largest number of tokens of each text, prompt included.
        texts: how many there are.
        log: where the reason goes, if it is ``None`` though there are some for the device.
    """
    with _saying_why(log):
        if _decodes_natively(model):
            return batch_for(model, capacity, texts)
    return None


def _decodes_natively(model: PreTrainedModel) -> bool:
    # A float model would be in memory twice.
    if model.device.type == "cuda" or (
        model.device.type == "cpu" and not any(packed_modules(model))
    ):
        return False
    if model.device.type == "cpu" and model.dtype != torch.float32:
        raise BackendUnavailable(f"the native decoder computes in float32, not {model.dtype}")
    return True


@contextlib.contextmanager
def _saying_why(log: IO[str]) -> Iterator[None]:
    try:
        yield
    except BackendUnavailable as error:
        log.write(f"decoding with the modules of transformers: {error}\n")
