"""Drop the layers that the recipe names: a model goes in, and another comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, ModelGraph, OptionError, Stage, hookimpl


class StageName(Stage):
    """Drop the layers that the recipe names."""

    name = "stage_name"

    layers: list[int] = Field(min_length=1, description="Layers to drop, by their number in the original model, counted from 0.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        model: ModelGraph

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the plan knows of the model afterwards; where nothing is known of it before, nothing."""
        model = inputs.get("model")
        if model is None or model.kept is None:
            return {}
        missing = sorted(set(self.layers) - set(model.kept))
        if missing:
            raise OptionError("layers", f"there is no layer {missing[0]}: the model has layers {list(model.kept)}")
        kept = tuple(layer for layer in model.kept if layer not in self.layers)
        if not kept:
            raise OptionError("layers", f"dropping all {len(model.kept)} layers leaves none")
        return {"model": model.model_copy(update={"layers": len(kept), "kept": kept})}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        return self.Outputs(model=inputs.model.without_layers(self.layers))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [StageName]
