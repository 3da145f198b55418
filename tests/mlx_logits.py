"""Compute logits of a folder with mlx-lm, in float32. A program of its own: it runs in the Python that has mlx-lm.

    python mlx_logits.py FOLDER PROMPTS.json OUT.npy STEPS

The array holds, for each prompt, the logits after all but the last `STEPS` tokens, and after each of those, which go through the
cache one by one: float32 (prompts, STEPS + 1, V).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def run(folder: str, prompts: list[list[int]], out: str, steps: int) -> None:
    """Write the array."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    rows = []
    for prompt in prompts:
        cache = make_prompt_cache(model)
        head = len(prompt) - steps
        parts = (prompt[:head], *([token] for token in prompt[head:]))
        rows.append(np.stack([np.array(model(mx.array([part]), cache=cache)[0, -1]) for part in parts]))
    np.save(out, np.stack(rows).astype(np.float32))


if __name__ == "__main__":
    run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3], int(sys.argv[4]))
