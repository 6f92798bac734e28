"""The model that lm-eval asks, with its batches dealt out to the processes of a run.

lm-eval can share questions itself, by accelerate and between GPUs, and then deals out documents.
Its batches, and so how sums round, then depend on the number of processes, and so do the examples
in prompts that it draws at random. Here every process has the same questions and the same batches,
those of lm-eval in one process, and computes some of them: the answers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from tqdm import tqdm

from quantine.ranks.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Encoded = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation, as texts and as tokens."""


class TaskModel(HFLM):
    """lm-eval's model, each batch of which is computed by one of the ranks, for all of them.

    All ranks are asked the same, and get all answers. To lm-eval each is a process of its own.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch: number of sequences that go through the model together.
        begins: whether questions begin with the tokenizer's token for it.
        ranks: the processes that share the batches.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, batch: int, begins: bool, ranks: Ranks
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=begins
        )
        self._ranks = ranks

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of each text, as many texts to a rank as go into a batch."""
        found = self._dealt(
            [requests[first : first + self.batch_size] for first in self._firsts(requests)],
            super().loglikelihood_rolling,
            disable_tqdm,
        )
        return [value for values in found for value in values]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt.

        What is drawn at random goes on from batch to batch: the first rank then draws all.
        """
        if any(request.args[1].get("do_sample") for request in requests):
            ordinary = super().generate_until
            return self._ranks.of_first(lambda: ordinary(requests, disable_tqdm=True))
        numbered = [(*request.args, number) for number, request in enumerate(requests)]
        batches = Collator(
            numbered,
            sort_fn=lambda item: (-len(self.tok_encode(item[0])), item[0]),
            group_fn=lambda item: item[1],
            group_by="gen_kwargs",
        )
        chunks = list(batches.get_batched(n=self.batch_size))
        found = self._dealt(
            [[requests[item[2]] for item in chunk] for chunk in chunks],
            super().generate_until,
            disable_tqdm,
        )
        answers: list[str] = batches.get_original([one for chunk in found for one in chunk])
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Encoded],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The log likelihood of each continuation, and whether it is the likeliest."""
        ordinary = super()._loglikelihood_tokens
        if override_bs is not None:  # from `loglikelihood_rolling`, and dealt out there
            return list(ordinary(requests, disable_tqdm=True, override_bs=override_bs))
        # Those that differ in the last token alone go through the model once, for all of them.
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            alike.setdefault((*context, *continuation[:-1]), []).append(number)
        order = sorted(alike, key=lambda tokens: (-len(tokens), tokens))
        batches = [
            [
                number
                for tokens in order[first : first + self.batch_size]
                for number in alike[tokens]
            ]
            for first in self._firsts(order)
        ]
        found = self._dealt(
            [[requests[number] for number in batch] for batch in batches], ordinary, disable_tqdm
        )
        answers: dict[int, tuple[float, bool]] = {}
        for batch, values in zip(batches, found, strict=True):
            answers.update(zip(batch, values, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _firsts(self, pieces: Sequence[object]) -> range:
        """The number of the first of the ``pieces`` of each batch."""
        return range(0, len(pieces), self.batch_size)

    def _dealt(
        self,
        batches: Sequence[list[Any]],
        ask: Callable[..., Sequence[T]],
        disable_tqdm: bool,
    ) -> list[Sequence[T]]:
        """What ``ask`` answers to each of the ``batches``, each asked by one rank."""
        ranks, found = self._ranks, []
        hidden = disable_tqdm or not ranks.first
        for first in tqdm(range(0, len(batches), ranks.count), disable=hidden, desc="Batches"):
            own = first + ranks.index
            answered = ask(batches[own], disable_tqdm=True) if own < len(batches) else None
            found += [one for one in ranks.gather(answered) if one is not None]
        return found
