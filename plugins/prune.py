"""Remove layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    Context,
    Estimate,
    Forecasts,
    LayerScores,
    ModelCosts,
    ModelError,
    ModelForecast,
    ModelGraph,
    OptionError,
    Outlook,
    ScoresForecast,
    Stage,
    StageError,
    StructureProbe,
    hookimpl,
    known,
)
from gradmap_pipeline.stages.removal import count_removed


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
    among: Literal["any", "expressible", "regular"] = Field(
        "any",
        description="`any`: the first of the scored decisions. `expressible`: of the removals after which a config can still "
        "say where each kind of layer is, the one of least total score; for models whose layers alternate by a cadence. "
        "`regular`: of the removals that leave kinds of layers in the order and period of the original; for programs that place "
        "them by index, as llama.cpp does.",
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

    def forecast(self, inputs: Forecasts) -> Outlook:
        return {"model": self._forecast_model(inputs)}

    def _forecast_model(self, inputs: Forecasts) -> ModelForecast:
        """The model that is left. Raises `OptionError` where there is none."""
        model = inputs.of(ModelGraph)
        depth, kept = model.layers, model.kept
        if isinstance(self.layers, list):
            missing = sorted(set(self.layers) - set(kept)) if kept is not None else []
            if missing:
                raise OptionError("layers", f"there is no layer {missing[0]}: the model has layers {_name_layers(kept or ())}")
            count = len(self.layers)
            kept = None if kept is None else tuple(layer for layer in kept if layer not in self.layers)
        elif "scores" not in inputs:
            raise OptionError("layers", "nothing says which layers to remove; put gradmap_score before this step, or list them")
        else:
            count, kept = self._count(depth, inputs.of(LayerScores)), None
        if depth is not None and count >= depth:
            raise OptionError(self._option, f"removing {count} of {depth} layers leaves none")
        if model.config is not None and model.kept is not None:
            self._check_expressible(model.config, model.kept, count, kept)
            self._check_regular(model.config, model.kept, count, kept)
        layers = None if depth is None else depth - count
        return model.model_copy(update={"layers": layers, "kept": kept})

    def _check_regular(self, config: dict[str, Any], layers: tuple[int, ...], count: int, kept: tuple[int, ...] | None) -> None:
        """Raise `OptionError` where `among: regular` cannot be had, or the layers that are listed break it."""
        from gradmap_pipeline.checkpoint.cadence import choose_kept, find_period, is_regular
        from gradmap_pipeline.checkpoint.depth import count_layers

        if self.among != "regular":
            return
        depth = count_layers(config) or len(layers)
        if find_period(config, depth) is None:
            raise OptionError(
                "among", f"the kinds of the model's {depth} layers have no period to keep; use `any` or `expressible`"
            )
        if kept is not None and not is_regular(config, depth, kept):
            found = choose_kept(config, depth, len(layers) - count, _prefer_ends(layers), regular=True)
            example = f"; possible, for instance: remove {_name_others(layers, found)}" if found else ""
            raise OptionError("layers", f"the layers that would be left do not keep the period of their kinds{example}")

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        from gradmap_pipeline.export.consumers import complete_config, name_programs

        model = inputs.of(ModelGraph)
        if self.among == "regular" or isinstance(self.layers, list):
            return ()
        config = complete_config(known(model.config), model.folder)
        programs = name_programs(config)
        if not programs:
            return ()
        return (
            f"{' and '.join(programs)} place{'s' if len(programs) == 1 else ''} layers of {config['model_type']} by their index, "
            "which most removals break; `among: regular` chooses among those that do not",
        )

    def _check_expressible(self, config: dict[str, Any], layers: tuple[int, ...], count: int, kept: tuple[int, ...] | None) -> None:
        """Raise `OptionError`, with the removals that are possible, where the config cannot say what would be left."""
        from gradmap_pipeline.checkpoint.cadence import choose_kept, strict_cadences_of
        from gradmap_pipeline.checkpoint.depth import check_removable, count_layers, prune_fields

        depth = count_layers(config) or len(layers)
        try:
            check_removable(config)
            if kept is not None:
                prune_fields(config, config, kept)
        except ModelError as error:
            raise OptionError(self._option, f"{error}{_name_possible(config, depth, layers, count)}") from None
        if kept is not None or not strict_cadences_of(config):
            return
        if not choose_kept(config, depth, len(layers) - count, dict.fromkeys(layers, 1.0)):
            found = f"no removal of {count} of {len(layers)} layers leaves a model that its config can express"
            raise OptionError(self._option, f"{found}{_name_possible(config, depth, layers, count)}")
        if self.among == "any":
            fields = ", ".join(repr(field) for cadence in strict_cadences_of(config) for field in cadence.fields)
            raise OptionError(
                self._option,
                f"config fields {fields} place layers by a cadence, which most removals break; set `among: expressible` to choose "
                f"only among those that do not{_name_possible(config, depth, layers, count)}",
            )

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        from gradmap_pipeline.checkpoint.architecture import full_config

        kept = self._forecast_model(inputs).kept
        if self.among == "regular":
            layers = inputs.of(ModelGraph).kept or probe.graph.layers
            count = len(self.layers) if isinstance(self.layers, list) else self._count(len(layers), None)
            self._check_regular(full_config(probe.graph.base.folder), layers, count, kept)
        if kept is not None:
            probe.check_removal(kept)
        elif self.among == "any":
            probe.check_removable()

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        return Estimate(costs.program_bytes)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.checkpoint.layer_check import check_same_layers

        model = inputs.model
        removed = self.layers if isinstance(self.layers, list) else self._choose(model, inputs.scores)
        pruned = model.without_layers(removed)
        check_same_layers(model.base, pruned.layers)  # now rather than when the model is exported
        context.note(f"removed layers {', '.join(map(str, sorted(removed)))} of {model.base.layers}")
        return self.Outputs(model=pruned)

    def _choose(self, model: ModelGraph, scores: LayerScores | None) -> list[int]:
        """Base layers to remove, by their scores."""
        from gradmap_pipeline.checkpoint.architecture import full_config
        from gradmap_pipeline.checkpoint.cadence import choose_kept
        from gradmap_pipeline.checkpoint.depth import find_sources

        assert scores is not None
        if scores.model != model.digest:
            raise StageError("the scores were made on another model than the one to prune; score this model first")
        count = self._count(len(model.layers), None)
        if self.among == "any":
            return list(scores.order[:count])
        config = full_config(model.base.folder)
        fixed = {*scores.protected, *find_sources(config)} & set(model.layers)
        importance = {
            layer: scores.decisions[0].scores.get(layer, 0.0) for layer in model.layers
        }  # some leave protected layers out
        regular = self.among == "regular"
        kept = choose_kept(config, model.base.layers, len(model.layers) - count, importance, fixed, regular=regular)
        if not kept:
            kind = "keeps the period of their kinds" if regular else "a config can express"
            raise StageError(
                f"every removal of {count} of {len(model.layers)} layers that {kind} takes one of layers "
                f"{', '.join(map(str, sorted(fixed)))}, which are protected; protect fewer in the step that scores"
            )
        return [layer for layer in model.layers if layer not in kept]

    @property
    def _option(self) -> str:
        """The option that says how much to remove."""
        return "layers" if self.layers is not None else "ratio"

    def _count(self, depth: int | None, scores: ScoresForecast | None) -> int:
        if isinstance(self.layers, int):
            count = self.layers
        elif depth is None:
            return 0
        else:
            count = count_removed(depth, 0.25 if self.ratio is None else self.ratio)
        if scores is not None and scores.all_or_nothing and self.among != "any":
            raise OptionError("among", f"the scored layers were chosen to go together, and {self.among!r} would choose among them")
        if scores is not None and scores.all_or_nothing and depth is not None and count != scores.decisions:
            raise OptionError(
                self._option,
                f"removes {count} of {depth} layers, but {scores.decisions} were chosen to go together; set the same "
                f"{self._option!r} on the step that scores (its default is ratio: 0.25)",
            )
        if scores is not None and scores.decisions is not None and count > scores.decisions:
            of = f" of {depth}" if depth is not None else ""
            raise OptionError(
                self._option,
                f"removes {count}{of} layers, but only {scores.decisions} removals are scored; "
                f"set the same {self._option!r} on the step that scores (its default is ratio: 0.25)",
            )
        return count


def _name_layers(layers: tuple[int, ...]) -> str:
    """`0 to 11`, or the list where some are missing."""
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


def _name_possible(config: dict[str, Any], depth: int, layers: tuple[int, ...], count: int) -> str:
    """What a cadence leaves possible, as the end of a message; nothing where there is no cadence."""
    from gradmap_pipeline.checkpoint.cadence import choose_kept, count_removable, strict_cadences_of

    if not strict_cadences_of(config):
        return ""
    kept = choose_kept(config, depth, len(layers) - count, _prefer_ends(layers))
    if kept:
        return f"; possible, for instance: remove {_name_others(layers, kept)}"
    counts = count_removable(config, depth, layers)
    return f"; possible: removals of {', '.join(map(str, counts))} layers" if counts else "; no removal does"


def _prefer_ends(layers: tuple[int, ...]) -> dict[int, float]:
    """Importance that spares the first and the last layer, for examples."""
    return dict.fromkeys(layers, 1.0) | {layers[0]: 2.0, layers[-1]: 2.0}


def _name_others(layers: tuple[int, ...], kept: tuple[int, ...]) -> str:
    return ", ".join(str(layer) for layer in layers if layer not in kept)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Prune]
