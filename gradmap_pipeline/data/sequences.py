"""Token ids to samples: packed or padded, drawn by a seed, checked against the model's embeddings."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

from ..errors import StageError
from .documents import Document
from .encoding import encode
from .tokenizer import check_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Packing = Literal["documents", "none"]

SHUFFLE_POOL = 8
"""Sequences that are read for each one drawn, where samples are drawn at random."""


def make_sequences(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    length: int,
    samples: int | None,
    packing: Packing = "documents",
    seed: int | None = None,
    embeddings: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn documents into (input_ids, attention_mask), both int64 (samples, length).

    `documents` packs texts end to end into full sequences; `none` makes one sequence a text, cut at `length` and
    padded on the right. `samples` None takes all. With a seed, samples are drawn from eight times as many sequences.
    `embeddings`: rows of the model's token embeddings; an id beyond them is refused.
    """
    return stack_rows(draw_rows(tokenizer, documents, length, samples, packing, seed, embeddings), tokenizer, embeddings)


def draw_rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    length: int,
    samples: int | None,
    packing: Packing,
    seed: int | None,
    embeddings: int | None,
) -> list[array[int]]:
    """The ids of each sequence, without padding. As in `make_sequences`."""
    import torch

    sequences = _cut(tokenizer, documents, length, packing)
    if samples is not None:
        sequences = islice(sequences, min(samples if seed is None else samples * SHUFFLE_POOL, sys.maxsize))
    rows = [array("i", ids) for ids in sequences]
    if samples is not None and len(rows) < samples:
        raise StageError(explain_few(len(rows), samples, length))
    if not rows:
        raise StageError(f"the data set gives no sample of {length} tokens; lower 'sequence_length', or use more text")
    if embeddings is not None:
        check_ids(rows, tokenizer, embeddings)  # drawn or not: another step may draw what this one does not
    if samples is not None and seed is not None:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]
        rows = [rows[index] for index in chosen.tolist()]
    return rows


def count_rows(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], length: int, samples: int, packing: Packing
) -> int:
    """Return how many sequences the documents give, up to `samples`."""
    return sum(1 for _ in islice(_cut(tokenizer, documents, length, packing), samples))


def explain_few(given: int, samples: int, length: int) -> str:
    """Why a data set is too small."""
    return (
        f"the data set gives only {given} of {samples} samples of {length} tokens; "
        "lower 'samples' or 'sequence_length', or use more text"
    )


def stack_rows(
    rows: Sequence[array[int]], tokenizer: PreTrainedTokenizerBase, embeddings: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both int64 (samples, length of the longest), padded on the right."""
    import torch

    padding = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    if embeddings is not None and padding >= embeddings:
        padding = 0  # it is masked, so any id that the model has will do
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), padding, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.frombuffer(row, dtype=torch.int32)
        attention_mask[number, : len(row)] = 1
    return input_ids, attention_mask


def digest_sequences(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> str:
    """SHA-256 of samples, both int64 (samples, length)."""
    digest = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
    for tensor in (input_ids, attention_mask):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _cut(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], length: int, packing: Packing) -> Iterator[list[int]]:
    """The ids of each sequence that documents give, in order."""
    if packing == "documents":
        yield from _pack(tokenizer, documents, length)
    else:
        heads = (list(islice(chain.from_iterable(parts), length)) for parts in encode(tokenizer, documents))
        yield from (ids for ids in heads if len(ids) > 1)


def _pack(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], length: int) -> Iterator[list[int]]:
    """Full sequences only. One starts with BOS where the tokenizer adds it, as the model was trained to expect."""
    start = tokenizer("")["input_ids"][:1]
    starts_with_bos = start == [tokenizer.bos_token_id] and bool(start)
    separator = [] if starts_with_bos or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prefix = start if starts_with_bos else []
    waiting: list[int] = []
    for document in encode(tokenizer, documents):
        for ids in chain(document, [separator]):
            waiting = [*waiting, *ids]
            cut = 0
            while True:
                head = [] if waiting[cut : cut + 1] == prefix else prefix
                end = cut + length - len(head)
                if end > len(waiting):
                    break
                yield [*head, *waiting[cut:end]]
                cut = end
            waiting = waiting[cut:]
