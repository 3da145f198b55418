"""How far a pruned model is from the whole one on a text, block by block, and intervals of differences between two models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmap_pipeline import Batch, DatasetSource, ModelGraph, SamplePass, load_tokenizer, make_batches, make_sequences
from gradmap_pipeline.sweep.head_losses import slice_positions
from gradmap_pipeline.sweep.layerwise import LayerwiseModel

if TYPE_CHECKING:
    import torch

LENGTH = 256
BLOCK = 4
"""Neighbouring sequences that the bootstrap draws together."""
BATCH = 8
"""Sequences that go through a model together."""


@dataclass(frozen=True)
class Reading:
    """Sums over the tokens of each sequence, (sequences,) each."""

    loss: np.ndarray[Any, Any]
    """Cross-entropy in nats."""
    divergence: np.ndarray[Any, Any]
    """KL of the whole model's prediction to this one's, in nats."""
    agreement: np.ndarray[Any, Any]
    """Tokens whose most likely successor is the same."""
    length: int = LENGTH
    """Tokens a sequence."""

    @property
    def tokens(self) -> int:
        return len(self.loss) * (self.length - 1)

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
        np.savez(file, loss=self.loss, divergence=self.divergence, agreement=self.agreement, length=self.length)


def load_reading(file: Path) -> Reading:
    with np.load(file, allow_pickle=False) as arrays:
        return Reading(arrays["loss"], arrays["divergence"], arrays["agreement"], int(arrays.get("length", LENGTH)))


class Text:
    """Sequences of a text, spread over all of it, with what leaves the last layer of the whole model for them."""

    def __init__(
        self, model: ModelGraph, source: DatasetSource, sequences: int, length: int = LENGTH, dtype: str = "float32"
    ) -> None:
        """`dtype`: type that models compute in."""
        import torch

        self.dtype = dtype
        ids, _ = make_sequences(load_tokenizer(model.base), source.documents(), length, None, "documents")
        blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK, length)
        chosen = torch.linspace(0, len(blocks) - 1, min(sequences // BLOCK, len(blocks))).long()
        self.ids = blocks[chosen].reshape(-1, length)
        self._dense = [hidden for _, hidden in self._run(LayerwiseModel(model.dense, dtype=dtype))]

    def read(self, model: ModelGraph) -> Reading:
        """What a model says of every sequence."""
        import torch

        layerwise, parts = LayerwiseModel(model, dtype=self.dtype), []
        for dense, (batch, hidden) in zip(self._dense, self._run(layerwise), strict=True):
            sums = torch.zeros(3, len(hidden), dtype=torch.float64)
            for positions in slice_positions(layerwise, batch):
                ours, whole = (layerwise.head(batch, each, positions).float().log_softmax(-1) for each in (hidden, dense))
                following = batch.input_ids[:, positions.start + 1 : positions.stop + 1]
                ours, whole = ours[:, : following.shape[1]], whole[:, : following.shape[1]]
                sums[0] -= ours.gather(-1, following[..., None]).double().sum((1, 2))
                sums[1] += (whole.exp() * (whole - ours)).double().sum((1, 2))
                sums[2] += (whole.argmax(-1) == ours.argmax(-1)).double().sum(1)
            parts.append(sums)
        loss, divergence, agreement = torch.cat(parts, dim=1).numpy()
        return Reading(loss, divergence, agreement, self.ids.shape[1])

    def _run(self, layerwise: LayerwiseModel) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Some sequences at a time, and what leaves its last layer for them (B, T, D)."""
        import torch

        for batch in make_batches(self.ids, torch.ones_like(self.ids), BATCH * self.ids.shape[1]):
            one = SamplePass(layerwise, [batch], keep_boundaries=False)
            one.run_forward()
            yield batch, one.boundary(len(one.layers), 0)


def compare_losses(one: Reading, other: Reading, draws: int = 2000) -> tuple[float, float, float]:
    """Difference of mean losses, one less other, with the ends of its 95 % interval: paired bootstrap over blocks."""
    difference = (one.loss - other.loss).reshape(-1, BLOCK).mean(1) / (one.length - 1)
    drawn = np.random.default_rng(0).integers(len(difference), size=(draws, len(difference)))
    low, high = np.percentile(difference[drawn].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)
