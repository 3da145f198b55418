"""Remove layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    Context,
    Estimate,
    LayerScores,
    ModelForecast,
    ModelGraph,
    OptionError,
    Rehearsal,
    Stage,
    StageError,
    hookimpl,
)
from gradmap_pipeline.removal import count_removed


class Prune(Stage):
    """Remove the least important layers, or a list of layers."""

    name = "prune"
    libraries = ("transformers",)

    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the layers to remove. Default: 0.25.")
    layers: int | list[int] | None = Field(
        None,
        description="How many layers to remove, instead of `ratio`; or a list of the layers to remove, by their number in the "
        "original model, counted from 0.",
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
        model = inputs.get("model") or ModelForecast()
        depth, kept = model.layers, model.kept
        option = "layers" if self.layers is not None else "ratio"
        if model.fixed_depth is not None:
            raise OptionError(option, f"no layer of this model can be removed: {model.fixed_depth}")
        if isinstance(self.layers, list):
            missing = sorted(set(self.layers) - set(kept)) if kept is not None else []
            if missing:
                raise OptionError("layers", f"there is no layer {missing[0]}: the model has layers {_name_layers(kept or ())}")
            count = len(self.layers)
            kept = None if kept is None else tuple(layer for layer in kept if layer not in self.layers)
        elif "scores" not in inputs:
            raise OptionError("layers", "nothing says which layers to remove; put gradmap_score before this step, or list them")
        else:
            count, kept = self._count(depth, inputs["scores"]), None
        if depth is not None and count >= depth:
            raise OptionError(option, f"removing {count} of {depth} layers leaves none")
        layers = None if depth is None else depth - count
        return {"model": model.model_copy(update={"layers": layers, "kept": kept})}

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        return Estimate(rehearsal.program_bytes)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.model.architecture import prune_config

        model, scores = inputs.model, inputs.scores
        if isinstance(self.layers, list):
            removed = self.layers
        else:
            assert scores is not None
            if scores.model != model.digest:
                raise StageError("the scores were made on another model than the one to prune; score this model first")
            removed = list(scores.order[: self._count(len(model.layers), None)])
        pruned = model.without_layers(removed)
        prune_config(model.base.folder, pruned.layers)  # raises now rather than when the model is exported
        context.note(f"removed layers {', '.join(map(str, sorted(removed)))} of {model.base.layers}")
        return self.Outputs(model=pruned)

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


def _name_layers(layers: tuple[int, ...]) -> str:
    """`0 to 11`, or the list where some are missing."""
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Prune]
