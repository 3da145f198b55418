"""What all stages that rank layers have in common: options, decisions, protected layers, and what a ranking took."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, model_validator

from ..checkpoint.graph import ModelGraph
from ..context import Context
from ..data.calibration_set import CalibrationSet
from ..errors import OptionError, PluginError, StageError
from ..work import Round, Work
from .forecasts import known
from .layer_scores import Decision, LayerScores, ScoresForecast
from .ranking import Measure, Scorer, Scores, Scoring, check_scores, shorten
from .removal import count_removed
from .stage import Stage

if TYPE_CHECKING:
    from ..cost.estimate import Estimate
    from ..cost.model_costs import ModelCosts
    from .forecasts import Forecasts, Outlook
    from .structure_probe import StructureProbe


class LayerScoring(Stage):
    """Base of stages that rank layers: `class MyScore(LayerScoring)` says in `measure` how one ranking is made."""

    abstract = True

    all_or_nothing: ClassVar[bool] = False
    """Whether the decisions are one choice, of layers that are only worth removing all together."""

    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the layers to prepare decisions for. Default: 0.25.")
    layers: int | None = Field(None, ge=1, description="Number of decisions to prepare, instead of `ratio`.")
    protect_first: int = Field(1, ge=0, description="Layers at the bottom that are never removed.")
    protect_last: int = Field(1, ge=0, description="Layers at the top that are never removed.")

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        scores: LayerScores
        work: Work

    def measure(self, context: Context) -> Measure:
        """How scores are made, where sweeps make them."""
        raise NotImplementedError

    def open_scorer(self, model: ModelGraph, calibration: CalibrationSet, context: Context) -> tuple[Any, Scoring]:
        """What makes one ranking after another, and a key of all that rankings depend on besides the model and the calibration set.

        Here: sweeps over the calibration set, as `measure` says.
        """
        measure = self.measure(context)
        if not isinstance(measure, Measure) or not 0 < measure.sample_share <= 1:
            raise PluginError(f"stage {self.name!r}: 'measure' must return a Measure of a sample_share over 0 and up to 1")
        return measure.key, Scorer(self.name, measure, model, calibration, context)

    def describe(self) -> str:
        """The method, for people and reports."""
        raise NotImplementedError

    def decide(self, kept: Sequence[int], scores: Scores, wanted: int, protected: Collection[int]) -> list[Decision]:
        """The decisions, at least one and at most `wanted`, that one ranking of the layers left leads to. Here all of them."""
        return take_lowest(kept, scores, wanted, protected)

    @model_validator(mode="after")
    def _check_count(self) -> LayerScoring:
        if self.ratio is not None and self.layers is not None:
            raise ValueError("give 'ratio' or 'layers', not both")
        return self

    def forecast(self, inputs: Forecasts) -> Outlook:
        depth = inputs.of(ModelGraph).layers
        decisions = self.layers if depth is None else self.count_decisions(depth)
        removable = None if depth is None else max(0, depth - self.protect_first - self.protect_last)
        return {"scores": ScoresForecast(decisions=decisions, all_or_nothing=self.all_or_nothing, removable=removable)}

    def take_requests(self, requests: Sequence[Mapping[str, Any]], inputs: Forecasts) -> Stage:
        """As many decisions as the step that wants most of them, unless `ratio` or `layers` is set or the default suffices."""
        requests = [request for request in requests if request.keys() & {"ratio", "layers"}]
        if self.ratio is not None or self.layers is not None or not requests:
            return self
        depth = inputs.of(ModelGraph).layers
        if depth is None:
            ratios = [request["ratio"] for request in requests if "ratio" in request]
            layers = [request["layers"] for request in requests if "layers" in request]
            return self.model_copy(update={"ratio": max(ratios)} if ratios else {"layers": max(layers)})
        counts = [request["layers"] if "layers" in request else count_removed(depth, request["ratio"]) for request in requests]
        most = max(counts)
        is_enough = most == count_removed(depth, 0.25) if self.all_or_nothing else most <= count_removed(depth, 0.25)
        return self if is_enough else self.model_copy(update={"layers": most})

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        if "calibration" not in self.input_fields():
            return None  # a ranking without sweeps says itself what it takes
        text = inputs.of(CalibrationSet)
        return self.estimate_sweeps(known(inputs.of(ModelGraph).layers), known(text.samples), known(text.sequence_length), costs)

    def estimate_sweeps(self, depth: int, samples: int, tokens: int, costs: ModelCosts) -> Estimate | None:
        """Estimate the cost of scoring a model of `depth` layers: here, one pass through all layers, without losses."""
        return costs.forward_sweep(depth, samples, tokens, losses=False)

    def run(self, inputs: Any, context: Context) -> Any:
        from ..data import check_tokenizer

        check_tokenizer(inputs.calibration, inputs.model)
        model = inputs.model
        count, protected = self.count_decisions(len(model.layers)), self.protected(model.layers)
        key, scorer = self.open_scorer(model, inputs.calibration, context)
        base = {"model": model.digest, "calibration": inputs.calibration.digest, "metric": key}
        kept = list(model.layers)
        decisions: list[Decision] = []
        rounds: list[Round] = []
        scores: Scores = {}
        with context.progress("score layers", count, "decision") as advance, closing(scorer):
            while len(decisions) < count:
                ranking = context.remember({**base, "kept": list(kept)}, partial(scorer.score, set(kept), scores))
                scores = {int(layer): score for layer, score in ranking["scores"].items()}
                rounds.append(Round.model_validate(ranking["work"]))
                new = self._decide(kept, scores, count - len(decisions), protected)
                decisions += new
                kept = [layer for layer in kept if layer not in {decision.removed for decision in new}]
                advance(len(new))
        return self.Outputs(scores=self._tell(model, decisions, context), work=Work(rounds=tuple(rounds)))

    def rank(self, model: ModelGraph, scores: Scores, context: Context) -> LayerScores:
        """Decisions by scores that need no sweep. Raises `StageError` where one is not finite."""
        from ..sweep.finite import find_nonfinite_weights

        count, protected = self.count_decisions(len(model.layers)), self.protected(model.layers)
        scores = check_scores(self.name, scores, model.layers)
        broken = next((layer for layer, score in scores.items() if not math.isfinite(score)), None)
        if broken is not None:
            cause = find_nonfinite_weights(model) or f"what stage {self.name!r} makes of finite weights is not"
            raise StageError(f"the score of layer {broken} is not a finite number: {cause}")
        kept = list(model.layers)
        decisions: list[Decision] = []
        while len(decisions) < count:
            new = self._decide(kept, {layer: scores[layer] for layer in kept if layer in scores}, count - len(decisions), protected)
            decisions += new
            kept = [layer for layer in kept if layer not in {decision.removed for decision in new}]
        return self._tell(model, decisions, context)

    def _decide(self, kept: list[int], scores: Scores, wanted: int, protected: Collection[int]) -> list[Decision]:
        """What `decide` gives, held to what it promises."""
        made = self.decide(kept, scores, wanted, protected)
        if not isinstance(made, Sequence) or not all(isinstance(decision, Decision) for decision in made):
            raise PluginError(f"stage {self.name!r}: 'decide' must return a list of Decision, got {shorten(made)}")
        if not 1 <= len(made) <= wanted:
            raise PluginError(f"stage {self.name!r}: 'decide' must return 1 to {wanted} decisions, got {len(made)}")
        seen: set[int] = set()
        for layer in (decision.removed for decision in made):
            reasons = {"is not left": layer not in kept, "is protected": layer in protected, "is removed already": layer in seen}
            for reason in (reason for reason, holds in reasons.items() if holds):
                raise PluginError(f"stage {self.name!r}: 'decide' removes layer {layer}, which {reason}")
            seen.add(layer)
        return list(made)

    def _tell(self, model: ModelGraph, decisions: list[Decision], context: Context) -> LayerScores:
        context.note("least important layers, in order: " + ", ".join(str(decision.removed) for decision in decisions))
        return LayerScores(
            model=model.digest,
            method=self.describe(),
            decisions=tuple(decisions),
            protected=self.protected(model.layers),
            all_or_nothing=self.all_or_nothing,
        )

    def protected(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Base layers that are never removed."""
        return tuple(sorted({*layers[: self.protect_first], *layers[len(layers) - self.protect_last :]}))

    def count_decisions(self, depth: int) -> int:
        """Raises `OptionError` where protected layers leave too few."""
        count = self.layers if self.layers is not None else count_removed(depth, 0.25 if self.ratio is None else self.ratio)
        free = depth - self.protect_first - self.protect_last
        if count > free:
            option = "layers" if self.layers is not None else "ratio"
            raise OptionError(
                option,
                f"{count} of {depth} layers are to be scored for removal, but only {max(free, 0)} are not protected; "
                f"lower {option!r}, 'protect_first' ({self.protect_first}) or 'protect_last' ({self.protect_last})",
            )
        return count


def take_lowest(kept: Sequence[int], scores: Scores, wanted: int, protected: Collection[int]) -> list[Decision]:
    """Remove the layer with the lowest score, then the next, by one ranking; of equal ones the lower layer.

    Fewer than `wanted` where fewer that are not protected have a score.
    """
    left = {layer: scores[layer] for layer in kept if layer in scores}
    decisions = []
    for _ in range(wanted):
        free = {layer: score for layer, score in left.items() if layer not in protected}
        if not free:
            break
        removed, unprotected = min(free, key=free.__getitem__), min(left, key=left.__getitem__)
        decisions.append(Decision(removed=removed, scores=dict(left), removed_if_unprotected=unprotected))
        del left[removed]
    return decisions
