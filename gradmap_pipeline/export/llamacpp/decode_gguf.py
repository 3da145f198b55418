"""Time greedy decoding of a GGUF file, request by request. A program of its own: it runs in the Python that has llama-cpp-python.

    python decode_gguf.py FILE THREADS

It answers on standard output, a line of JSON a line: first the number of tokens that the file knows, then for each request
`{"prompts": [[1, 2], [3, 4]], "tokens": 8}`, whose prompts are of one length, the seconds of the pass over all prompts, those of
the passes over one further token of each, and the tokens chosen: `{"prefill": 0.1, "decode": 0.2, "ids": [[5, ...], [6, ...]]}`.

llama.cpp runs on the CPU with the settings that it has by itself, as its users do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_ERROR = 4  # ggml's number of the level of a message


class Decoder:
    """A file in llama.cpp on the CPU."""

    def __init__(self, file: str, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.errors: list[str] = []
        self._log = llama_cpp.llama_log_callback(self._keep_error)
        llama_cpp.llama_log_set(self._log, None)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), options)
        if not self.model:
            raise SystemExit(f"it does not load the file: {self._name_error()}")
        self.threads = threads
        self.words: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.shape = (0, 0, 0)

    def answer(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Seconds of both parts, and the tokens chosen of each prompt."""
        self._open_context(len(prompts), len(prompts[0]), tokens)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        started = time.perf_counter()
        chosen = [self._decode(prompts, 0)]
        first = time.perf_counter()
        for step in range(tokens):
            chosen.append(self._decode([[token] for token in chosen[-1]], len(prompts[0]) + step))
        ended = time.perf_counter()
        return {"prefill": first - started, "decode": ended - first, "ids": [list(row) for row in zip(*chosen, strict=True)]}

    def _open_context(self, rows: int, length: int, tokens: int) -> None:
        """Room for so many sequences."""
        if (rows, length, tokens) == self.shape:
            return
        if self.context is not None:
            self.api.llama_free(self.context)
        options = self.api.llama_context_default_params()
        options.n_seq_max = rows
        options.n_ctx = rows * (length + tokens + 1)
        options.n_batch = rows * length
        options.n_threads = options.n_threads_batch = self.threads
        if hasattr(options, "kv_unified"):  # else each sequence gets an equal part of the cache, rounded down
            options.kv_unified = True
        self.context = self.api.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"it makes no context of {rows} x {length + tokens} tokens: {self._name_error()}")
        self.shape = (rows, length, tokens)

    def _decode(self, rows: list[list[int]], start: int) -> list[int]:
        """The likeliest token after each row of tokens, of which `start` are in the cache."""
        import numpy as np

        count = sum(map(len, rows))
        batch = self.api.llama_batch_init(count, 0, 1)
        lasts = []
        try:
            batch.n_tokens = count
            place = 0
            for number, row in enumerate(rows):
                for position, token in enumerate(row):
                    batch.token[place], batch.pos[place] = token, start + position
                    batch.n_seq_id[place], batch.seq_id[place][0] = 1, number
                    batch.logits[place] = position == len(row) - 1
                    place += 1
                lasts.append(place - 1)
            code = self.api.llama_decode(self.context, batch)
        finally:
            self.api.llama_batch_free(batch)
        if code:
            raise SystemExit(f"it cannot run {count} tokens after {start} (code {code}): {self._name_error()}")
        logits = (np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, last), shape=(self.words,)) for last in lasts)
        return [int(row.argmax()) for row in logits]

    def _keep_error(self, level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            self.errors.append(text.decode("utf-8", "replace").strip())

    def _name_error(self) -> str:
        """The first of what llama.cpp complained about; what follows says that something failed."""
        return self.errors[0] if self.errors else "it said nothing"


def main(file: str, threads: int) -> None:
    """Answer until standard input ends. Whatever else is written to standard output goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    decoder = Decoder(file, threads)
    print(json.dumps({"words": decoder.words}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(decoder.answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
