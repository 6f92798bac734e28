"""Generating text with a model, token by token."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantine.core.ambient import own_state
from quantine.core.device import device_named
from quantine.errors import BackendUnavailable, PlanError
from quantine.runtime.decoder import Decoder, decoder_for
from quantine.runtime.graph_decoder import StaticDecoder, graph_decoder_for
from quantine.runtime.load import load_model
from quantine.runtime.packed import packed_modules
from quantine.runtime.prompt import Transcript, conversation_ids, text_ids
from quantine.runtime.sampling import Sampler, Sampling
from quantine.source.locate import locate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def stream(
    model: str | Path,
    prompt: str,
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
    """Generate a continuation of ``prompt`` and write it to ``out`` as it is made.

    Args:
        model: a float or quantized model, as for `quantine.source.locate.locate`.
        prompt: the text to continue.
        tokens: largest number of tokens to generate.
        chat: whether to wrap the prompt in the tokenizer's chat template.
        temperature: divisor of logits before sampling; 0 always takes the most likely token.
        seed: seed of a local random generator.
        dtype: dtype of activations and of weights that are not quantized.
        out: where the text goes.
        log: where the speed goes, and why no decoder of quantine's is used if none is.
        device: device of the model, by PyTorch's name.

    Raises:
        BackendUnavailable: there is no such device.
        CalibrationError: the tokenizer cannot read the prompt, or belongs to another model.
        PlanError: the prompt is empty, too long for the model, or an option is out of range.
        CheckpointError, FormatError: the model cannot be read.
    """
    if tokens < 1:
        raise PlanError(f"tokens must be positive, not {tokens}")
    sampling = Sampling(temperature, seed=seed)
    where = device_named(device)
    source = locate(model)
    tokenizer = source.tokenizer()
    config = source.config().get_text_config()
    if chat:
        messages = [{"role": "user", "content": prompt}]
        ids = conversation_ids(tokenizer, messages, config.vocab_size)
    else:
        ids = text_ids(tokenizer, prompt, config.vocab_size)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + tokens > longest:
        raise PlanError(
            f"{ids.shape[1]} prompt tokens and {tokens} new ones exceed the model's context of "
            f"{longest}: ask for fewer"
        )
    loaded = load_model(source, dtype, where)
    decoder = decoder_on(loaded, ids.shape[1] + tokens, log)
    started = time.perf_counter()
    first = started
    transcript = Transcript(tokenizer)
    for token in continue_tokens(loaded, ids, tokens, sampling, decoder):
        if not len(transcript):
            first = time.perf_counter()
        out.write(transcript.add(token))
        out.flush()
    out.write("\n")
    decoding, count = time.perf_counter() - first, len(transcript)
    speed = f", {(count - 1) / decoding:.1f} tokens/s" if count > 1 else ""
    log.write(f"{ids.shape[1]} prompt tokens in {first - started:.2f} s{speed}\n")


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
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    append = ModuleDecoder(model).append if decoder is None else decoder.append
    sampler = Sampler(sampling)
    step = ids[0]
    for _ in range(tokens):
        token = sampler.choose(append(step))
        if token in ends:
            return
        yield token
        step = torch.tensor([token], dtype=torch.int64, device=ids.device)


class ModuleDecoder:
    """The interface of `Decoder` for any model, computed by its modules in transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: Any = None

    def reset(self) -> None:
        """Forget all tokens seen, so that a new text can begin."""
        self._cache = None

    @own_state()
    def append(self, tokens: Tensor) -> Tensor:
        """Run the model on further tokens.

        Args:
            tokens: ``[n]`` int64 token ids, on the CPU wherever the model is.

        Returns:
            Logits ``[vocabulary]`` float32 for the token after the last one.
        """
        output = self._model(
            input_ids=tokens.unsqueeze(0).to(self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
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
    on_cpu = model.device.type == "cpu"
    if on_cpu and not any(packed_modules(model)):
        return None  # a float model would be in memory twice
    try:
        if model.device.type == "cuda":
            return graph_decoder_for(model, capacity)
        if on_cpu and model.dtype != torch.float32:
            raise BackendUnavailable(f"the native decoder computes in float32, not {model.dtype}")
        return decoder_for(model, capacity)
    except BackendUnavailable as error:
        log.write(f"decoding with the modules of transformers: {error}\n")
        return None
