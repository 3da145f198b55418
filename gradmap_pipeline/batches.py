"""Samples in batches, and the loss of predicting their tokens.

Sizes: B sequences a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import StageError

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Token ids that go through the model together."""

    input_ids: torch.Tensor
    """int64 (B, T)."""
    mask: torch.Tensor
    """bool (B, T), False where padded."""

    @property
    def has_padding(self) -> bool:
        return not bool(self.mask.all())


def make_batches(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, batch_tokens: int = BATCH_TOKENS, *, lengths_apart: bool = False
) -> list[Batch]:
    """Cut samples (samples, T) into batches of about `batch_tokens` tokens: tokens first, then padding, as far as the longest goes.

    `lengths_apart`: only samples of one length go together, for models in which a longer sample changes the others
    (`lengths.lengths_apart`). Raises `StageError` where a sample has no token.
    """
    import torch

    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    if not bool(lengths.all()):
        raise StageError(f"sample {int(lengths.argmin())} is all padding; give samples of at least one token")
    # Positions count from the first column, so a token has the place that it has in its sample alone.
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    size = max(1, batch_tokens // input_ids.shape[1])
    everything = torch.arange(len(lengths))
    groups = [everything[lengths == length] for length in lengths.unique()] if lengths_apart else [everything]
    batches = []
    for rows in (part for group in groups for part in group.split(size)):
        longest = int(lengths[rows].max())
        batches.append(Batch(input_ids[rows, :longest], mask[rows, :longest]))
    return batches


def take_first(batch: Batch, most: int) -> Batch:
    """The first tokens of the first sample, at most so many, without padding."""
    few = slice(0, min(most, int(batch.mask[0].sum())))
    return Batch(batch.input_ids[:1, few], batch.mask[:1, few])


def count_predicted(batches: Iterable[Batch]) -> int:
    """Tokens that are predicted from a token before them."""
    return sum(int(predicted_tokens(batch).sum()) for batch in batches)


def predicted_tokens(batch: Batch) -> torch.Tensor:
    """Which tokens are predicted from a token before them, bool (B, T-1)."""
    return batch.mask[:, 1:] & batch.mask[:, :-1]


def next_token_losses(logits: torch.Tensor, batch: Batch, start: int = 0) -> torch.Tensor:
    """Cross-entropy in fp32 of each token given those before it; 0 where either is padding.

    logits (B, n, V) are those at positions start … start+n-1; the result is (B, n), or (B, n-1) at the end of the
    sequence, where nothing follows the last token.
    """
    import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by

    targets = batch.input_ids[:, start + 1 : start + 1 + logits.shape[1]].to(logits.device)
    counted = predicted_tokens(batch)[:, start : start + logits.shape[1]].to(logits.device)
    losses = F.cross_entropy(logits[:, : targets.shape[1]].float().transpose(1, 2), targets, reduction="none")
    return losses * counted
