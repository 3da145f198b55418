"""SLEB: remove the layer without which the loss is least, and search again in what is left.

Source: https://arxiv.org/abs/2402.09025. The first and the last layer stay.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from pydantic import Field

from gradmap_pipeline import (
    Context,
    Decision,
    Estimate,
    LayerScoring,
    Measure,
    ModelCosts,
    SamplePass,
    Stage,
    hookimpl,
    take_lowest,
)


class SlebScore(LayerScoring):
    """Rank layers by the loss of the model without each of them, again after each removal (SLEB)."""

    name = "sleb_score"
    parallel = True

    prefix: Literal["kept", "computed"] = Field(
        "kept",
        description="`kept`: what lies below a layer left out is computed once. `computed`: for each candidate again, as in "
        "the published program. The choice is the same.",
    )

    def measure(self, context: Context) -> Measure:
        key = ["loss without a layer", self.prefix, self.protect_first, self.protect_last]
        return Measure(self._measure_losses, key, keep="all", may_share_layers=True)

    def describe(self) -> str:
        return "loss without a layer, greedy"

    def decide(self, kept: Sequence[int], scores: dict[int, float], wanted: int, protected: Collection[int]) -> list[Decision]:
        return take_lowest(kept, scores, 1, protected)

    def estimate_sweeps(self, depth: int, samples: int, tokens: int, costs: ModelCosts) -> Estimate | None:
        free = depth - self.protect_first - self.protect_last
        layers = sum((free - done) * (depth - done) for done in range(self.count_decisions(depth)))
        share = 1 if self.prefix == "computed" else 0.5
        return costs.forward_sweep(depth, samples, tokens) * max(1, round(layers * share / depth))

    def _measure_losses(self, sweep: SamplePass) -> dict[int, float]:
        """Mean loss in nats without each layer that may go."""
        candidates = sweep.layers[self.protect_first : len(sweep.layers) - self.protect_last]
        is_recomputed = self.prefix == "computed"
        layers = sweep.own(candidates)
        return {layer: sweep.loss_without(layer, from_bottom=is_recomputed) / sweep.predicted for layer in layers}


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [SlebScore]
