"""Rank layers by the norm of their weights, the smallest first; no data is needed."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, LayerScores, LayerScoring, ModelGraph, Stage, hookimpl, load_tensor


class StageName(LayerScoring):
    """Rank layers by the norm of their weights."""

    name = "stage_name"

    mean: bool = Field(False, description="Divide by the root of the number of weights, so that layers of other sizes compare.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        scores: LayerScores

    def describe(self) -> str:
        return "norm of weights"

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model = inputs.model
        scores: dict[int, float] = {}
        with context.progress("read layers", len(model.layers), "layer") as advance:
            for layer in model.layers:
                scores[layer] = self._score(model, layer)
                advance()
        return self.Outputs(scores=self.rank(model, scores, context))

    def _score(self, model: ModelGraph, layer: int) -> float:
        squares, elements = 0.0, 0
        for tensor in model.layer_tensors(layer).values():
            squares += float(load_tensor(tensor).double().square().sum())
            elements += tensor.elements
        return float((squares / elements if self.mean else squares) ** 0.5)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [StageName]
