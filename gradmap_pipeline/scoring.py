"""What all stages that rank layers have in common: options, decisions, protected layers, and what a ranking took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, model_validator

from .artifacts import CalibrationSet, Decision, LayerScores, Round, ScoresForecast, Work
from .errors import OptionError, StageError
from .model.graph import ModelGraph
from .removal import count_removed
from .stage import Context, Stage

if TYPE_CHECKING:
    from .estimate import Estimate
    from .model.parts import PartedSweep
    from .model.survey import Survey
    from .model.sweep import Sweep
    from .rehearsal import Rehearsal

Scores = dict[int, float]
"""Importance by base layer. Higher means keep."""


@dataclass(frozen=True)
class Measure:
    """How a stage gets its scores from sweeps over the calibration set."""

    of: Callable[[Sweep], Scores]
    """What one sweep gives for the layers it has: this process's share of a sum over samples."""
    key: Any
    """All that the scores depend on besides the model, the calibration set and the layers that are left."""
    backward: bool = False
    weight_gradients: bool = False
    sample_share: float = 1.0
    """Share of the calibration samples that are swept, the first of them."""


class LayerScoring(Stage):
    """Base of stages that rank layers: `class MyScore(LayerScoring)` says in `measure` how one ranking is made."""

    abstract = True

    together: ClassVar[bool] = False
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

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        model = inputs.get("model")
        if model is None or model.layers is None:
            return {"scores": ScoresForecast(decisions=self.layers, together=self.together)}
        return {"scores": ScoresForecast(decisions=self.count_decisions(model.layers), together=self.together)}

    def inspect(self, inputs: Mapping[str, Any], survey: Survey) -> None:
        survey.check_layerwise()

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        model, calibration = inputs.get("model"), inputs.get("calibration")
        if model is None or model.layers is None or calibration is None or calibration.sequence_length is None:
            return None
        return self.estimate_sweeps(model.layers, calibration.samples, calibration.sequence_length, rehearsal)

    def estimate_sweeps(self, depth: int, samples: int, tokens: int, rehearsal: Rehearsal) -> Estimate | None:
        """What scoring a model of `depth` layers takes; here, one forward pass."""
        return rehearsal.forward_sweep(depth, samples, tokens)

    def run(self, inputs: Any, context: Context) -> Any:
        from .data import check_tokenizer

        check_tokenizer(inputs.calibration, inputs.model)
        model = inputs.model
        count, protected = self.count_decisions(len(model.layers)), self.protected(model.layers)
        measure = self.measure(context)
        scorer = _Scorer(measure, model, inputs.calibration, context)
        base = {"model": model.digest, "calibration": inputs.calibration.digest, "metric": measure.key}
        kept = list(model.layers)
        decisions: list[Decision] = []
        rounds: list[Round] = []
        with context.progress("score layers", count, "decision") as advance:
            while len(decisions) < count:
                found = context.remember({**base, "kept": list(kept)}, partial(scorer.score, set(kept)))
                scores = {int(layer): score for layer, score in found["scores"].items()}
                rounds.append(Round.model_validate(found["work"]))
                new = self.decide(kept, scores, count - len(decisions), protected)
                decisions += new
                kept = [layer for layer in kept if layer not in {decision.removed for decision in new}]
                advance(len(new))
        return self.Outputs(scores=self._tell(model, decisions, context), work=Work(rounds=tuple(rounds)))

    def rank(self, model: ModelGraph, scores: Scores, context: Context) -> LayerScores:
        """Decisions by scores that need no sweep."""
        protected = self.protected(model.layers)
        return self._tell(model, self.decide(model.layers, scores, self.count_decisions(len(model.layers)), protected), context)

    def _tell(self, model: ModelGraph, decisions: list[Decision], context: Context) -> LayerScores:
        context.note("least important layers, in order: " + ", ".join(str(decision.removed) for decision in decisions))
        return LayerScores(
            model=model.digest,
            method=self.describe(),
            decisions=tuple(decisions),
            protected=self.protected(model.layers),
            together=self.together,
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
    """Remove the layer with the lowest score, then the next, by one ranking; of equal ones the lower layer."""
    left = {layer: scores[layer] for layer in kept if layer in scores}
    decisions = []
    for _ in range(wanted):
        free = {layer: score for layer, score in left.items() if layer not in protected}
        removed, unguarded = min(free, key=free.__getitem__), min(left, key=left.__getitem__)
        decisions.append(Decision(removed=removed, scores=dict(left), unguarded=unguarded))
        del left[removed]
    return decisions


class _Scorer:
    """Scores the layers that are left, one ranking after another; the next starts from what the last leaves valid."""

    def __init__(self, measure: Measure, model: ModelGraph, calibration: CalibrationSet, context: Context) -> None:
        self.measure, self.model, self.calibration, self.context = measure, model, calibration, context
        self._sweeps: PartedSweep | None = None
        self._left: set[int] = set()

    @property
    def used_samples(self) -> int:
        """How many of the calibration samples are swept."""
        return math.ceil(self.measure.sample_share * self.calibration.samples)

    def score(self, kept: set[int]) -> dict[str, Any]:
        """Importance by layer, and the work it took, as JSON."""
        started = time.perf_counter()
        sweeps = self._sweeps_of(kept)
        before = sweeps.layer_forwards, sweeps.layer_backwards
        scores: Scores = {}
        reused, forward_seconds = 0, 0.0
        for sweep in sweeps:
            reused = sweep.done
            since = time.perf_counter()
            if self.measure.backward:
                sweep.run_forward()
            forward_seconds += time.perf_counter() - since
            for layer, score in self.measure.of(sweep).items():
                scores[layer] = scores.get(layer, 0.0) + score
        scores = self.context.group.sum_values(scores)
        broken = [layer for layer, score in sorted(scores.items()) if not math.isfinite(score)]
        if broken:
            raise StageError(
                f"the score of layer {broken[0]} is not a finite number; the model overflows in {self.context.dtype}: "
                "use --dtype float32 or bfloat16"
            )
        seconds = time.perf_counter() - started
        share = self.used_samples / self.calibration.samples
        saved = forward_seconds / max(1, len(kept) - reused) * reused
        work = Round(
            layer_forwards=(sweeps.layer_forwards - before[0]) * share,
            layer_backwards=(sweeps.layer_backwards - before[1]) * share,
            seconds=seconds,
            reused_layers=reused,
            saved=saved / (seconds + saved),
        )
        return {"scores": scores, "work": work.model_dump()}

    def _sweeps_of(self, kept: set[int]) -> PartedSweep:
        from .model.parts import PartedSweep

        if self._sweeps is None:
            layers = set(self.model.layers)
            used = self.used_samples
            self._sweeps = PartedSweep(
                self.model.without_layers(layers - kept) if kept < layers else self.model,
                *(self.context.group.share(part[:used]) for part in self.calibration.load()),
                device=self.context.device,
                dtype=self.context.dtype,
                memory=self.context.memory,
                folder=self.context.folder,
                backward=self.measure.backward,
                weight_gradients=self.measure.weight_gradients,
                group=self.context.group,
                divisible=not self.measure.weight_gradients,
            )
            self._left = set(kept)
        for layer in self._left - kept:
            self._sweeps.remove(layer)
        self._left = set(kept)
        return self._sweeps
