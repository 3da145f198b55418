"""Losses of next tokens and their gradients from the last hidden states: the head, on as many positions at once as memory allows.

Sizes: B sequences a batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ..batches import Batch, next_token_losses

if TYPE_CHECKING:
    import torch

    from .layerwise import LayerwiseModel

LOGITS_AT_ONCE = 1 << 24
"""Elements of the logits that are held at a time."""
LOGIT_BYTES = 16
"""A loss, its gradient and their temporaries, for each logit held at once."""


def slice_positions(model: LayerwiseModel, batch: Batch) -> list[slice]:
    """Runs of positions, in order, whose logits are small enough to hold at once."""
    rows, tokens = batch.input_ids.shape
    step = max(1, LOGITS_AT_ONCE // (rows * model.words))
    if step >= tokens or not model.can_slice_logits:
        return [slice(0, tokens)]
    return [slice(start, min(start + step, tokens - 1)) for start in range(0, tokens - 1, step)]


def compute_losses(model: LayerwiseModel, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token (B, T-1), 0 where padded, from what leaves the last layer, (B, T, D)."""
    import torch

    with torch.no_grad():
        parts = []
        for positions in slice_positions(model, batch):
            with _booked(model, batch, positions):
                parts.append(next_token_losses(model.head(batch, hidden, positions), batch, positions.start))
    return torch.cat(parts, dim=1)


def compute_logits(model: LayerwiseModel, batch: Batch, hidden: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """Logits (B, n, V) from what leaves the last layer, (B, T, D): of the `last` positions alone, where that is given."""
    import torch

    tokens = hidden.shape[1]
    wanted = slice(0 if last is None else max(0, tokens - last), tokens)
    with torch.no_grad():
        logits = model.head(batch, hidden, wanted if len(slice_positions(model, batch)) > 1 else None)
    return logits[:, -(wanted.stop - wanted.start) :]


def differentiate_losses(model: LayerwiseModel, batch: Batch, hidden: torch.Tensor, factor: float) -> torch.Tensor:
    """The gradient of `factor` times the sum of a batch's losses with respect to what leaves the last layer, (B, T, D)."""
    import torch

    leaf = hidden.detach().requires_grad_()
    gradient: torch.Tensor | None = None
    for positions in slice_positions(model, batch):
        with torch.enable_grad(), _booked(model, batch, positions):
            logits = model.head(batch, leaf, positions)
            loss = next_token_losses(logits, batch, positions.start).sum() * factor
            part = torch.autograd.grad(loss, leaf)[0]
            del logits, loss
        gradient = part if gradient is None else gradient.add_(part)
    assert gradient is not None
    return gradient


def _booked(model: LayerwiseModel, batch: Batch, positions: slice) -> AbstractContextManager[None]:
    size = LOGIT_BYTES * len(batch.input_ids) * (positions.stop - positions.start) * model.words
    return model.weights.ledger.holding("logits", size)
