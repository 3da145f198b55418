"""Layers with the smallest weights are removed first; no data is needed.

Source: the magnitude criterion of https://arxiv.org/abs/2402.02834: Σ |w|^p over all weights of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    Estimate,
    Forecasts,
    LayerScores,
    LayerScoring,
    ModelCosts,
    ModelGraph,
    Stage,
    hookimpl,
    load_tensor,
)

if TYPE_CHECKING:
    import torch


def magnitude(weights: list[torch.Tensor], power: int) -> float:
    """Σ |w|^p over all entries."""
    return float(sum(weight.double().abs().pow(power).sum() for weight in weights))


class MagnitudeScore(LayerScoring):
    """Rank layers by the size of their weights."""

    name = "magnitude_score"

    power: int = Field(1, ge=1, le=2, description="p of Σ|w|^p.")
    protect_first: int = Field(0, ge=0, description="Layers at the bottom that are never removed.")
    protect_last: int = Field(0, ge=0, description="Layers at the top that are never removed.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        scores: LayerScores

    def describe(self) -> str:
        return f"magnitude, power {self.power}"

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        size = costs.stored_layer_bytes
        return Estimate(costs.program_bytes, bytes_read=size, seconds=size * costs.speed.read_again())

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model = inputs.model
        scores: dict[int, float] = {}
        with context.progress("read layers", len(model.layers), "layer") as advance:
            for layer in model.layers:
                tensors = model.layer_tensors(layer).values()
                scores[layer] = magnitude([load_tensor(tensor) for tensor in tensors if tensor.is_float], self.power)
                advance()
        return self.Outputs(scores=self.rank(model, scores, context))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [MagnitudeScore]
