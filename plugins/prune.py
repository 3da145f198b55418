"""Remove layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import Context, LayerScores, ModelForecast, ModelGraph, OptionError, Stage, StageError, hookimpl
from gradmap_pipeline.removal import count_removed


class Prune(Stage):
    """Remove the least important layers, or a list of layers."""

    name = "prune"
    libraries = ()

    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the layers to remove. Default: 0.25.")
    layers: int | list[int] | None = Field(
        None, description="How many layers to remove, instead of `ratio`; or a list of the layers to remove, counted from 0."
    )

    class Inputs(BaseModel):
        model: ModelGraph
        scores: LayerScores | None = None

    class Outputs(BaseModel):
        model: ModelGraph

    @model_validator(mode="after")
    def _check_choice(self) -> Prune:
        if self.ratio is not None and self.layers is not None:
            raise ValueError("give 'ratio' or 'layers', not both")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"'layers' must be at least 1, found {self.layers}")
        if isinstance(self.layers, list) and (not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0):
            raise ValueError(f"'layers' must list different layers, counted from 0; found {self.layers}")
        return self

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        depth = inputs["model"].layers if inputs.get("model") else None
        if isinstance(self.layers, list):
            if depth is not None and max(self.layers) >= depth:
                raise OptionError("layers", f"there is no layer {max(self.layers)}: the model has layers 0 to {depth - 1}")
            count = len(self.layers)
        elif "scores" not in inputs:
            raise OptionError("layers", "nothing says which layers to remove; put gradmap_score before this step, or list them")
        else:
            count = self._count(depth, inputs["scores"])
        if depth is not None and count >= depth:
            raise OptionError("layers" if self.layers is not None else "ratio", f"removing {count} of {depth} layers leaves none")
        positions = inputs["model"].positions if inputs.get("model") else None
        return {"model": ModelForecast(layers=None if depth is None else depth - count, positions=positions)}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model, scores = inputs.model, inputs.scores
        if isinstance(self.layers, list):
            removed = self.layers
        else:
            assert scores is not None
            if scores.model != model.digest:
                raise StageError("the scores were made on another model than the one to prune; score this model first")
            removed = list(scores.order[: self._count(len(model.layers), None)])
        context.note(f"removed layers {', '.join(map(str, sorted(removed)))} of {model.base.layers}")
        return self.Outputs(model=model.without_layers(removed))

    def _count(self, depth: int | None, scores: Any) -> int:
        if isinstance(self.layers, int):
            count = self.layers
        elif depth is None:
            return 0
        else:
            count = count_removed(depth, 0.25 if self.ratio is None else self.ratio)
        if scores is not None and scores.decisions is not None and count > scores.decisions:
            option = "layers" if self.layers is not None else "ratio"
            of = f" of {depth}" if depth is not None else ""
            raise OptionError(
                option,
                f"removes {count}{of} layers, but only {scores.decisions} removals are scored; "
                f"set the same {option!r} on the step that scores (its default is ratio: 0.25)",
            )
        return count


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Prune]
