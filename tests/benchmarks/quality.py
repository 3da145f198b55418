"""How far a pruned model is from the whole one on a text, block by block, and intervals of differences between two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradmap_pipeline import ModelGraph
from gradmap_pipeline.data import DatasetSource, load_tokenizer, make_sequences

LENGTH = 256
BLOCK = 4
"""Neighbouring sequences that the bootstrap draws together."""


@dataclass(frozen=True)
class Reading:
    """Sums over the tokens of each sequence, (sequences,) each."""

    loss: np.ndarray[Any, Any]
    """Cross-entropy in nats."""
    divergence: np.ndarray[Any, Any]
    """KL of the whole model's prediction to this one's, in nats."""
    agreement: np.ndarray[Any, Any]
    """Tokens whose most likely successor is the same."""

    @property
    def tokens(self) -> int:
        return len(self.loss) * (LENGTH - 1)

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.loss.sum()) / self.tokens)

    def summary(self) -> dict[str, float]:
        return {
            "perplexity": self.perplexity,
            "divergence": float(self.divergence.sum()) / self.tokens,
            "agreement": float(self.agreement.sum()) / self.tokens,
        }

    def save(self, file: Path) -> None:
        np.savez(file, loss=self.loss, divergence=self.divergence, agreement=self.agreement)


def load_reading(file: Path) -> Reading:
    with np.load(file, allow_pickle=False) as arrays:
        return Reading(arrays["loss"], arrays["divergence"], arrays["agreement"])


class Text:
    """Sequences of a text, spread over all of it, with what the whole model says of them."""

    def __init__(self, model: ModelGraph, source: DatasetSource, sequences: int) -> None:
        import torch

        ids, _ = make_sequences(load_tokenizer(model.base), source.documents(), LENGTH, None, "documents")
        blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK, LENGTH)
        chosen = torch.linspace(0, len(blocks) - 1, min(sequences // BLOCK, len(blocks))).long()
        self.ids = blocks[chosen].reshape(-1, LENGTH)
        self._dense = [logits.log_softmax(-1).half() for logits in _logits(model.dense, self.ids)]

    def read(self, model: ModelGraph) -> Reading:
        """What a model says of every sequence."""
        loss, divergence, agreement = [], [], []
        for ids, dense, logits in zip(self.ids.split(8), self._dense, _logits(model, self.ids), strict=True):
            ours, whole = logits.log_softmax(-1)[:, :-1], dense.float()[:, :-1]
            loss.append(-ours.gather(-1, ids[:, 1:, None]).double().sum((1, 2)))
            divergence.append((whole.exp() * (whole - ours)).double().sum((1, 2)))
            agreement.append((whole.argmax(-1) == ours.argmax(-1)).double().sum(1))
        import torch

        return Reading(*(torch.cat(parts).numpy() for parts in (loss, divergence, agreement)))


def _logits(model: ModelGraph, ids: Any) -> Any:
    """Logits (8, T, V) of eight sequences at a time."""
    import torch

    from gradmap_pipeline.batches import make_batches
    from gradmap_pipeline.sweep.layerwise import LayerwiseModel
    from gradmap_pipeline.sweep.sample_pass import SamplePass

    layerwise = LayerwiseModel(model)
    for batch in make_batches(ids, torch.ones_like(ids), 8 * LENGTH):
        yield from SamplePass(layerwise, [batch], keep_boundaries=False).logits()


def compare_losses(one: Reading, other: Reading, draws: int = 2000) -> tuple[float, float, float]:
    """Difference of mean losses, one less other, with the ends of its 95 % interval: paired bootstrap over blocks."""
    difference = (one.loss - other.loss).reshape(-1, BLOCK).mean(1) / (LENGTH - 1)
    drawn = np.random.default_rng(0).integers(len(difference), size=(draws, len(difference)))
    low, high = np.percentile(difference[drawn].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)
