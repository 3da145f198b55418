"""Score layers by depth: the last go first; and measure depth. Stages as a stranger would publish them."""

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, Decision, LayerScores, Measurement, Metric, ModelGraph, ScoresForecast, Stage, hookimpl


class TopLayersScore(Stage):
    """Remove layers from the top, whatever they do."""

    name = "top_layers_score"
    keep_last: int = Field(1, ge=0, description="Layers at the very top that stay.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        scores: LayerScores

    def forecast(self, inputs):
        return {"scores": ScoresForecast()}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        left = list(inputs.model.layers)
        decisions = []
        while len(left) > self.keep_last + 1:
            scores = {layer: float(-position) for position, layer in enumerate(left)}
            chosen = left.pop(-1 - self.keep_last)
            decisions.append(Decision(removed=chosen, scores=scores, removed_if_unprotected=left[-1]))
        scores = LayerScores(model=inputs.model.digest, method="depth", decisions=tuple(decisions))
        return self.Outputs(scores=scores)


class MeasureDepth(Stage):
    """Measure how many layers a model has."""

    name = "measure_depth"
    metric_names = ("depth",)

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        depth: Measurement

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        metric = Metric(name="depth", value=len(inputs.model.layers), unit="layers", better="lower", stderr=0.25)
        return self.Outputs(depth=Measurement(model=inputs.model.digest, metrics=(metric,)))


@hookimpl
def gradmap_stages():
    return [TopLayersScore, MeasureDepth]
