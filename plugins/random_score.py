"""Layers in random order: what a ranking has to beat."""

from __future__ import annotations

import random

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, Estimate, Forecasts, LayerScores, LayerScoring, ModelCosts, ModelGraph, Stage, hookimpl


class RandomScore(LayerScoring):
    """Rank layers at random, by the recipe's seed."""

    name = "random_score"

    draw: int = Field(0, ge=0, description="Number of the draw; each gives another order under the same seed.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        scores: LayerScores

    def describe(self) -> str:
        return f"random, draw {self.draw}"

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        return Estimate(costs.program_bytes)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        source = random.Random(f"{context.seed} {self.draw}")
        scores = {layer: source.random() for layer in inputs.model.layers}
        return self.Outputs(scores=self.rank(inputs.model, scores, context))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [RandomScore]
