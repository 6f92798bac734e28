"""Run by llama-cpp-python's own Python: times llama.cpp on GGUF files, as it is asked to.

    python llama_cpp_decoder.py ROOM FILE.gguf ...

Each line of input is a JSON list: the number of a file, ``"read"`` or ``"write"``, threads, tokens
that precede, and tokens to read at once or to write one by one. Each answer is a line with the
seconds. ROOM is the most tokens of a text.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


class Text:
    """A text of one model, which is read and continued.

    Args:
        file: GGUF file.
        room: most tokens of the text.
    """

    def __init__(self, file: str, room: int) -> None:
        self._model = llama_cpp.Llama(
            file, n_ctx=room, n_batch=512, n_ubatch=512, logits_all=False, verbose=False
        )
        self._words = self._model.n_vocab()
        self._position = 0

    def seconds(self, work: str, threads: int, before: int, tokens: int) -> float:
        """How long it takes to read or write ``tokens`` after the first ``before`` of the text."""
        llama_cpp.llama_set_n_threads(self._model.ctx, threads, threads)
        self._go_to(before)
        started = time.perf_counter()
        if work == "read":
            self._read(tokens)
        else:
            token = 3
            for _ in range(tokens):
                self._append([token])
                token = self._most_likely()
        return time.perf_counter() - started

    def _go_to(self, position: int) -> None:
        if self._position < position:
            self._read(position - self._position)
        memory = llama_cpp.llama_get_memory(self._model.ctx)
        if not llama_cpp.llama_memory_seq_rm(memory, 0, position, -1):
            raise SystemExit(f"llama.cpp does not forget what follows token {position}")
        self._position = position

    def _read(self, count: int) -> None:
        for start in range(0, count, 512):
            at = self._position
            self._append([place % 97 + 3 for place in range(at, at + min(512, count - start))])

    def _append(self, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch only points to it
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(self._model.ctx, batch):
            raise SystemExit(f"llama.cpp does not take {len(tokens)} tokens at {self._position}")
        self._position += len(tokens)

    def _most_likely(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        shares = np.ctypeslib.as_array(logits, (self._words,))
        return int(shares.argmax())


def main() -> None:
    """Answer until there are no more lines."""
    texts = [Text(file, int(sys.argv[1])) for file in sys.argv[2:]]
    for line in sys.stdin:
        number, work, threads, before, tokens = json.loads(line)
        print(json.dumps(texts[number].seconds(work, threads, before, tokens)), flush=True)


if __name__ == "__main__":
    main()
