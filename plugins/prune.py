"""Remove layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    CalibrationSet,
    Context,
    DecodingShape,
    Estimate,
    Forecasts,
    LayerScores,
    ModelCosts,
    ModelForecast,
    ModelGraph,
    OptionError,
    Outlook,
    PruningTarget,
    ScoresForecast,
    Stage,
    StageError,
    StructureProbe,
    check_regular_removal,
    check_removal_by_config,
    check_room_for_decoding,
    check_same_layers,
    check_tokenizer,
    choose_expressible,
    count_removed,
    estimate_decoding,
    find_index_programs,
    full_config,
    hookimpl,
    known,
    measure_speed,
)

_PROMPT, _NEW = 128, 32
"""Tokens of the prompt, and those decoded after it, by which a model is timed."""
_ROUNDS = 3


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
    target: PruningTarget | None = Field(
        None,
        description="What the pruned model is to meet, instead of `ratio`: `parameters`, `bytes`, `max_perplexity_ratio` or "
        "`tokens_per_second`, as in `target: {parameters: 110M}`. The fewest layers that reach a size or a speed are removed, or "
        "the most that hold a ratio.",
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
        calibration: CalibrationSet | None = None

    class Outputs(BaseModel):
        model: ModelGraph

    @property
    def machine_bound(self) -> bool:  # type: ignore[override]
        """Whether what is removed depends on how fast this machine is."""
        return self.target is not None and self.target.is_timed

    @model_validator(mode="after")
    def _check_choice(self) -> Prune:
        given = [name for name in ("ratio", "layers", "target") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of 'ratio', 'layers' and 'target'; found {' and '.join(map(repr, given))}")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"'layers' must be at least 1, found {self.layers}")
        if isinstance(self.layers, list) and (not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0):
            raise ValueError(f"'layers' must list different layers, counted from 0; found {self.layers}")
        return self

    def forecast(self, inputs: Forecasts) -> Outlook:
        return {"model": self._forecast_model(inputs)}

    def request(self, inputs: Forecasts) -> Mapping[str, Mapping[str, Any]]:
        """As many scored removals as this step may make."""
        if "scores" not in inputs or isinstance(self.layers, list):
            return {}
        if self.target is not None:
            worst = self._count_worst(self.target, inputs)
            return {} if worst is None else {"scores": {"layers": worst}}
        depth, removable = inputs.of(ModelGraph).layers, inputs.of(LayerScores).removable
        if depth is not None and removable is not None and self._count(depth, None) > removable:
            raise OptionError(
                self._option,
                f"removes {self._count(depth, None)} of {depth} layers, but only {removable} are not protected; lower "
                f"{self._option!r}, or 'protect_first' or 'protect_last' of the step that scores",
            )
        if self.layers is not None:
            return {"scores": {"layers": self.layers}}
        return {} if self.ratio is None else {"scores": {"ratio": self.ratio}}

    def _forecast_model(self, inputs: Forecasts) -> ModelForecast:
        """The model that is left. Raises `OptionError` where there is none."""
        model = inputs.of(ModelGraph)
        depth, kept = model.layers, model.kept
        if self.target is not None:
            self._count_worst(self.target, inputs)
            self.target.check_scored(model, inputs.of(LayerScores))
            return model.model_copy(update={"layers": None, "kept": None})
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
            check_removal_by_config(model.config, model.kept, count, kept, self._option, is_free=self.among == "any")
            if self.among == "regular":
                check_regular_removal(model.config, model.kept, count, kept)
        layers = None if depth is None else depth - count
        return model.model_copy(update={"layers": layers, "kept": kept})

    @staticmethod
    def _count_worst(target: PruningTarget, inputs: Forecasts) -> int | None:
        """Layers that may have to go for it. Raises `OptionError` where it cannot be met, or what it takes is not there."""
        scores = inputs.of(LayerScores)
        if "scores" not in inputs:
            raise OptionError("target", "nothing says which layers to remove; put gradmap_score before this step")
        if scores.all_or_nothing:
            raise OptionError(
                "target", "the scored layers were chosen to go together; give this step and that one the same 'ratio'"
            )
        if target.measured_text and "calibration" not in inputs:
            raise OptionError("target", "perplexity is measured on the calibration set; put calibrate before this step")
        return target.count_worst(inputs.of(ModelGraph), scores)

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        model = inputs.of(ModelGraph)
        if self.among == "regular" or isinstance(self.layers, list):
            return ()
        config = known(model.config)
        programs = find_index_programs(config, model.folder)
        if not programs:
            return ()
        return (
            f"{' and '.join(programs)} place{'s' if len(programs) == 1 else ''} layers of {config['model_type']} by their index, "
            "which most removals break; `among: regular` chooses among those that do not",
        )

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        kept = self._forecast_model(inputs).kept
        if self.among == "regular" and self.target is None:
            layers = inputs.of(ModelGraph).kept or probe.graph.layers
            count = len(self.layers) if isinstance(self.layers, list) else self._count(len(layers), None)
            check_regular_removal(full_config(probe.graph.base.folder), layers, count, kept)
        if self.machine_bound:
            probe.check_loadable()
            if probe.room is not None:
                check_room_for_decoding(
                    probe.graph, [_shape_for(inputs.of(ModelGraph).positions)], probe.room.free, probe.room.dtype
                )
        if kept is not None:
            probe.check_removal(kept)
        elif self.among == "any":
            probe.check_removable()

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        if self.target is not None and self.target.is_timed:
            model = inputs.of(ModelGraph)
            tried = 2 + math.ceil(math.log2(known(self._count_worst(self.target, inputs)) + 1))
            return estimate_decoding(costs, [known(model.layers)], [_shape_for(model.positions)], tried * (_ROUNDS + 1))
        if self.target is None or not self.target.measured_text:
            return Estimate(costs.program_bytes)
        text, tried = inputs.of(CalibrationSet), known(self._count_worst(self.target, inputs))
        sweep = costs.forward_sweep(known(inputs.of(ModelGraph).layers), known(text.samples), known(text.sequence_length))
        return sweep * (1 + math.ceil(math.log2(tried + 1)))

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model = inputs.model
        removed = self.layers if isinstance(self.layers, list) else self._choose(inputs, context)
        pruned = model.without_layers(removed)
        check_same_layers(model.base, pruned.layers)  # now rather than when the model is exported
        context.note(f"removed layers {', '.join(map(str, sorted(removed)))} of {model.base.layers}")
        return self.Outputs(model=pruned)

    def _choose(self, inputs: Inputs, context: Context) -> list[int]:
        """Base layers to remove, by their scores."""
        model, scores, text = inputs.model, inputs.scores, inputs.calibration
        assert scores is not None
        if scores.model != model.digest:
            raise StageError("the scores were made on another model than the one to prune; score this model first")
        take = partial(self._take, model, scores)
        if self.target is None:
            return take(self._count(len(model.layers), None))
        if text is not None:
            check_tokenizer(text, model)
        return self.target.choose(model, len(scores.order), take, text, context, partial(_time, context=context))

    def _take(self, model: ModelGraph, scores: LayerScores, count: int) -> list[int]:
        if self.among == "any":
            return list(scores.order[:count])
        return choose_expressible(model, scores, count, regular=self.among == "regular")

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


def _shape_for(positions: int | None) -> DecodingShape:
    """What is decoded to time a model that is made for so many positions."""
    most = _PROMPT + _NEW if positions is None else min(positions, _PROMPT + _NEW)
    new = min(_NEW, most // 2)
    return DecodingShape(1, most - new, new)


def _time(model: ModelGraph, context: Context) -> float:
    """Tokens a second that a model decodes: the median of a few rounds."""
    shape = _shape_for(model.base.default_sequence_length)
    return median(measure_speed(model, None, [shape], context, rounds=_ROUNDS, warmup=1).cases[0].rates.decode)


def _name_layers(layers: tuple[int, ...]) -> str:
    """`0 to 11`, or the list where some are missing."""
    is_whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if is_whole else ", ".join(map(str, layers))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Prune]
