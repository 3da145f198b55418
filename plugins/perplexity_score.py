"""Layers without which, one at a time, the model predicts the calibration set best are removed first.

Source: https://arxiv.org/abs/2402.02834 (Shortened LLaMA), the perplexity criterion; here its logarithm, which orders the same.
"""

from __future__ import annotations

from gradmap_pipeline import Context, Estimate, LayerScoring, Measure, ModelCosts, SamplePass, Stage, hookimpl


class PerplexityScore(LayerScoring):
    """Rank layers by the loss of the model without each of them, one at a time."""

    name = "perplexity_score"
    parallel = True

    def measure(self, context: Context) -> Measure:
        return Measure(measure_losses, "loss without a layer", keep="all", may_share_layers=True)

    def describe(self) -> str:
        return "loss without a layer, one at a time"

    def estimate_sweeps(self, depth: int, samples: int, tokens: int, costs: ModelCosts) -> Estimate | None:
        return costs.forward_sweep(depth, samples, tokens) * max(1, depth // 2)


def measure_losses(sweep: SamplePass) -> dict[int, float]:
    """Mean loss in nats without each layer; what lies below it is computed once for all."""
    return {layer: sweep.loss_without(layer) / sweep.predicted for layer in sweep.own(sweep.layers)}


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [PerplexityScore]
