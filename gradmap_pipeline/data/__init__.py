"""Text for calibration and evaluation: where it comes from, and how it becomes token ids."""

from __future__ import annotations

from .sequences import SHUFFLE_POOL, digest_sequences, make_sequences
from .sources import DatasetSource
from .tokenizer import check_length, check_tokenizer, count_embeddings, load_tokenizer

__all__ = [
    "SHUFFLE_POOL",
    "DatasetSource",
    "check_length",
    "check_tokenizer",
    "count_embeddings",
    "digest_sequences",
    "load_tokenizer",
    "make_sequences",
]
