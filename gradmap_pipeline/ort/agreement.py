"""How far a quantised graph is from the one it was made from, on a text: perplexities, and how often both choose the same token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import StageError
from ..model.batches import Batch, make_batches, next_token_losses, predicted_tokens

if TYPE_CHECKING:
    import torch

    from .session import OnnxSession

_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Agreement:
    """How two graphs do on one text."""

    base_loss: float
    """Mean next-token loss of the first, in nats."""
    loss: float
    """Of the second."""
    agreement: float
    """Share of tokens, each after those before it, for which both graphs have the same most likely next token."""
    difference: float
    """Largest absolute difference of logits."""
    tokens: int
    """Tokens that were predicted."""

    @property
    def ratio(self) -> float:
        """Perplexity of the second, relative to that of the first; both are no larger than a number can be."""
        return math.exp(self.loss - self.base_loss)


def compare_graphs(
    base: OnnxSession, other: OnnxSession, batches: list[Batch], advance: Callable[[], None] = lambda: None
) -> Agreement:
    """Run both on the same batches. Raises `StageError` where the second computes what is no finite number."""
    losses = [0.0, 0.0]
    same = tokens = 0
    difference = 0.0
    for batch in batches:
        logits = [_run(session, batch) for session in (base, other)]
        if not bool(logits[1][batch.mask].isfinite().all()):
            raise StageError("the quantised graph computes values that are not finite; nothing was written")
        counted = predicted_tokens(batch)
        for index, found in enumerate(logits):
            losses[index] += float(next_token_losses(found, batch).double().sum())
        chosen = [found[:, :-1].argmax(-1) for found in logits]
        same += int((chosen[0] == chosen[1])[counted].sum())
        tokens += int(counted.sum())
        difference = max(difference, float((logits[0] - logits[1])[batch.mask].abs().max()))
        advance()
    if not tokens:
        raise StageError("no token is predicted: each text is one token long; use longer texts")
    return Agreement(losses[0] / tokens, losses[1] / tokens, same / tokens, difference, tokens)


def cut_batches(ids: torch.Tensor, mask: torch.Tensor, vocabulary: int) -> list[Batch]:
    """Samples (S, T) in batches whose logits fit into memory twice."""
    return make_batches(ids, mask, max(1, _LOGITS_AT_ONCE // vocabulary))


def _run(session: OnnxSession, batch: Batch) -> torch.Tensor:
    return session.run(batch.input_ids, batch.mask.long(), session.start(len(batch.input_ids)))[0].float()
