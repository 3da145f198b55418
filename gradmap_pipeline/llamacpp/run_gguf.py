"""Compute logits of a GGUF file. A program of its own: it runs in the Python that has llama-cpp-python.

    python run_gguf.py FILE PROMPTS.json OUT.npy THREADS STEPS

Of each prompt, a list of token ids, the last `STEPS` go through the cache one by one. The array holds, by prompt, the logits
after the part before them and after each, float32 (prompts by STEPS + 1, V).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_FLOAT32 = 0  # ggml's number of the type


def run(file: str, prompts: list[list[int]], out: str, threads: int, steps: int) -> None:
    """Keys and values are kept in float32, so that the type of the weights makes all the difference."""
    import numpy as np
    from llama_cpp import Llama, llama_get_logits_ith

    longest = max(map(len, prompts))
    model = Llama(
        model_path=file,
        n_ctx=longest,
        n_batch=longest,
        n_ubatch=longest,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        type_k=_FLOAT32,
        type_v=_FLOAT32,
        flash_attn=False,
        verbose=False,
    )
    rows = []
    for prompt in prompts:
        model.reset()
        head = len(prompt) - steps
        for part in (prompt[:head], *([token] for token in prompt[head:])):
            model.eval(part)
            rows.append(np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),)).copy())
    np.save(out, np.stack(rows))


if __name__ == "__main__":
    run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
