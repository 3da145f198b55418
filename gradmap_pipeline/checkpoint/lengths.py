"""Models in which a longer row of a batch changes what is computed of the others. Rows of other lengths stay out of its batch then.

Rotary factors of `longrope` and the base of `dynamic` follow the longest row. Attention that keeps only the best keys chooses them
among all columns of the batch (Doge, DeepSeek V3.2). What a row gives alone is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .source import load_config

_ROTARY = ("longrope", "su")
_KEYS_CHOSEN = ("keep_window_size", "index_topk")
"""Config fields of attention that keeps only the best keys."""


def lengths_apart(config: Any) -> bool:
    """Whether, by its config (as JSON), the length of one row changes what a model computes of the others."""
    if isinstance(config, list):
        return any(lengths_apart(part) for part in config)
    if not isinstance(config, dict):
        return False
    rope_types = [rope_type for name in ("rope_type", "type") if isinstance(rope_type := config.get(name), str)]
    follows_rotary = any(rope_type in _ROTARY or "dynamic" in rope_type for rope_type in rope_types)
    chooses_keys = any(isinstance(config.get(name), int) for name in _KEYS_CHOSEN)
    return follows_rotary or chooses_keys or any(lengths_apart(part) for part in config.values())


def lengths_apart_in(folder: Path) -> bool:
    """Whether the length of one row of a batch changes what the model in a folder computes of the others.

    Then only rows of one length may go together: `make_batches(..., lengths_apart=True)`.
    """
    return lengths_apart(load_config(folder))
