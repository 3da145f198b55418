"""Run some of a model's layers from hidden states that a pass has kept: what the model computes without one of its layers.

Sizes: B sequences a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .head_losses import compute_losses
from .kept_tensors import CANDIDATE, KeptTensors

if TYPE_CHECKING:
    import torch

    from .sample_pass import SamplePass

Outputs = Iterator[tuple[int, "torch.Tensor"]]
"""Batches by number, and what leaves the last layer for each (B, T, D)."""


def run_layers(one: SamplePass, kept: KeptTensors, layers: Sequence[int], start: int) -> Iterator[Outputs]:
    """Run base layers one after another from what enters the layer at `start`; batches come in groups, of those run together."""
    import torch

    model = one.model
    # Layers that stay in memory cost nothing to use again, so one batch at a time is enough.
    batches = range(len(one.batches))
    for group in ([index] for index in batches) if model.weights.is_resident else [list(batches)]:
        for number, layer in enumerate(layers):
            with model.layer(layer), torch.no_grad():
                if number + 1 < len(layers):
                    model.weights.expect(layers[number + 1])
                for index in group:
                    hidden = kept.get(CANDIDATE if number else start, index)
                    kept.put(CANDIDATE, index, model.run_layer(layer, hidden, one.arguments(index, layer)))
        yield _take(kept, CANDIDATE if layers else start, group)
    one.layer_forwards += len(layers)


def _take(kept: KeptTensors, level: int, group: Sequence[int]) -> Outputs:
    for index in group:
        yield index, kept.get(level, index)
        kept.forget(CANDIDATE, index)


def sum_losses(one: SamplePass, outputs: Iterator[Outputs]) -> float:
    """The sum of the losses of all tokens, by what leaves the last layer."""
    total = 0.0
    for group in outputs:
        with one.model.weights.head():
            for index, hidden in group:
                total += float(compute_losses(one.model, one.batches[index], hidden).double().sum())
    return total
