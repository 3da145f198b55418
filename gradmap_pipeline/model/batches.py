"""Samples in batches, and the loss of predicting their tokens.

Sizes: B sequences a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    def padded(self) -> bool:
        return not bool(self.mask.all())


def make_batches(input_ids: torch.Tensor, attention_mask: torch.Tensor, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Cut samples (samples, T) into batches of about `batch_tokens` tokens, without columns that are all padding."""
    size = max(1, batch_tokens // input_ids.shape[1])
    batches = []
    for ids, mask in zip(input_ids.split(size), attention_mask.bool().split(size), strict=True):
        used = mask.any(dim=0)
        batches.append(Batch(ids[:, used], mask[:, used]))
    return batches


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
