"""Drop the layers that the recipe names: a model goes in, and another comes out."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, Forecasts, ModelGraph, OptionError, Outlook, Stage, hookimpl, known


class StageName(Stage):
    """Drop the layers that the recipe names."""

    name = "stage_name"

    layers: list[int] = Field(min_length=1, description="Layers to drop, by their number in the original model, counted from 0.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        model: ModelGraph

    def forecast(self, inputs: Forecasts) -> Outlook:
        """What the plan knows of the model afterwards; where nothing is known of it before, nothing."""
        model = inputs.of(ModelGraph)
        before = known(model.kept)
        missing = sorted(set(self.layers) - set(before))
        if missing:
            raise OptionError("layers", f"there is no layer {missing[0]}: the model has layers {list(before)}")
        kept = tuple(layer for layer in before if layer not in self.layers)
        if not kept:
            raise OptionError("layers", f"dropping all {len(before)} layers leaves none")
        return {"model": model.model_copy(update={"layers": len(kept), "kept": kept})}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        return self.Outputs(model=inputs.model.without_layers(self.layers))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [StageName]
