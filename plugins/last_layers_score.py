"""The last layers go first: what merging into the layer below leaves when nothing is merged, and a floor for rankings."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, Estimate, Forecasts, LayerScores, LayerScoring, ModelCosts, ModelGraph, Stage, hookimpl


class LastLayersScore(LayerScoring):
    """Rank layers from the top down."""

    name = "last_layers_score"

    protect_first: int = Field(0, ge=0, description="Layers at the bottom that are never removed.")
    protect_last: int = Field(0, ge=0, description="Layers at the top that are never removed.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        scores: LayerScores

    def describe(self) -> str:
        return "last layers"

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        return Estimate(costs.program_bytes)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        layers = inputs.model.layers
        scores = {layer: float(above) for above, layer in enumerate(reversed(layers))}
        return self.Outputs(scores=self.rank(inputs.model, scores, context))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [LastLayersScore]
