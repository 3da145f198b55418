"""Perplexity from a mean loss."""

from __future__ import annotations

import math

from ..errors import StageError


def perplexity_of(loss: float, dataset: str) -> float:
    """exp of a mean loss in nats. Raises `StageError` where that is over the largest number."""
    try:
        return math.exp(loss)
    except OverflowError:
        raise StageError(
            f"the mean loss on {dataset!r} is {loss:.4g} nats a token, whose exponential, the perplexity, is over the largest "
            "number; such a model predicts nothing"
        ) from None
