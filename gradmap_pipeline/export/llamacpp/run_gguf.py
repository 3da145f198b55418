"""Compute logits of a GGUF file, request by request. A program of its own: it runs in the Python that has llama-cpp-python.

    python run_gguf.py FILE THREADS

It answers on standard output, a line of JSON a line: first the number of tokens that the file knows, then for each request
`{"prompts": [[1, 2], [3]], "steps": 1, "every": false, "out": "logits.npy"}` an object when the array is written.

`every` false: of each prompt, the last `steps` tokens go through the cache one by one; the array holds the logits after the part
before them and after each, float32 (prompts, steps + 1, V). `every` true: prompts are of one length, and the array holds the
logits after each of their tokens, float32 (prompts, T, V).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

_FLOAT32 = 0  # ggml's number of the type
_ERROR = 4  # and of the level of a message
_AT_ONCE = 256  # tokens whose logits llama.cpp holds together


class Runner:
    """A file in llama.cpp on the CPU.

    Keys and values are kept in float32, so that the type of the weights makes all the difference.
    """

    def __init__(self, file: str, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.errors: list[str] = []
        self._log = llama_cpp.llama_log_callback(self._keep_error)
        llama_cpp.llama_log_set(self._log, None)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = False  # weights repacked for the processor: with AMX, 8-bit ones can crash
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), options)
        if not self.model:
            raise SystemExit(f"it does not load the file: {self._name_error()}")
        self.threads = threads
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.longest = 0

    def open_context(self, length: int) -> None:
        """Room for prompts of so many tokens."""
        if length <= self.longest:
            return
        if self.context is not None:
            self.api.llama_free(self.context)
        options = self.api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.n_threads = options.n_threads_batch = self.threads
        options.type_k = options.type_v = _FLOAT32
        if hasattr(options, "flash_attn_type"):  # older releases have it off by default
            options.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = self.api.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"it makes no context of {length} tokens: {self._name_error()}")
        self.longest = length

    def decode(self, tokens: Sequence[int], start: int, every: bool) -> Any:
        """Logits (T, V) after each token, or (1, V) after the last. `start`: tokens that are in the cache."""
        import numpy as np

        count = len(tokens)
        batch = self.api.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, start + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = every or place == count - 1
            code = self.api.llama_decode(self.context, batch)
        finally:
            self.api.llama_batch_free(batch)
        if code:
            raise SystemExit(f"it cannot run {count} tokens after {start} (code {code}): {self._name_error()}")
        places = range(count) if every else (count - 1,)
        rows = [np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, place), shape=(self.words,)) for place in places]
        return np.stack(rows)

    def answer(self, prompts: list[list[int]], steps: int, every: bool, out: str) -> None:
        """Write the logits of the prompts to a file."""
        import numpy as np

        self.open_context(max(map(len, prompts)))
        rows = len(prompts[0]) if every else steps + 1
        stored = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=(len(prompts), rows, self.words))
        for number, prompt in enumerate(prompts):
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
            head = len(prompt) - steps
            if every:
                parts = [(at, prompt[at : at + _AT_ONCE]) for at in range(0, len(prompt), _AT_ONCE)]
            else:
                parts = [(0, prompt[:head]), *((at, prompt[at : at + 1]) for at in range(head, len(prompt)))]
            done = 0
            for start, part in parts:
                logits = self.decode(part, start, every)
                stored[number, done : done + len(logits)] = logits
                done += len(logits)
        stored.flush()

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
    runner = Runner(file, threads)
    print(json.dumps({"words": runner.words}), file=answers, flush=True)
    for line in sys.stdin:
        runner.answer(**json.loads(line))
        print("{}", file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
