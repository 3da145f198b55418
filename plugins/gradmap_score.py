"""GradMAP's first stage: layer importance from gradient magnitudes, one backward pass per pruning decision.

Source: https://arxiv.org/abs/2602.14649
Sizes: B sequences, T tokens, D hidden. h_l enters layer l, u_l = layer_l(h_l) - h_l is its residual update,
the loss is the mean next-token cross-entropy over the calibration set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gradmap_pipeline import (
    Artifact,
    CalibrationSet,
    Context,
    Decision,
    Estimate,
    LayerScores,
    ModelGraph,
    OptionError,
    Rehearsal,
    ScoresForecast,
    Stage,
    StageError,
    Survey,
    hookimpl,
)
from gradmap_pipeline.removal import count_removed

if TYPE_CHECKING:
    import torch

    from gradmap_pipeline.group import Group
    from gradmap_pipeline.model.parts import PartedSweep
    from gradmap_pipeline.model.sweep import Sweep


def gate_importance(gradient: torch.Tensor, update: torch.Tensor, mask: torch.Tensor) -> float:
    """Σ_t |⟨∂loss/∂h_{l+1,t}, u_{l,t}⟩|: each token's first-order change of the loss when the layer is gated off.

    gradient, update (B, T, D); mask bool (B, T).
    """
    return float(((gradient.float() * update.float()).sum(-1).abs() * mask).double().sum())


def update_importance(gradient: torch.Tensor, update: torch.Tensor, mask: torch.Tensor) -> float:
    """Σ_t ‖∂loss/∂h_{l+1,t}‖·‖u_{l,t}‖: a bound of the same change. gradient, update (B, T, D); mask bool (B, T)."""
    return float((gradient.float().norm(dim=-1) * update.float().norm(dim=-1) * mask).double().sum())


def weight_importance(gradients: list[torch.Tensor], weights: list[torch.Tensor], norm: str, weighting: str) -> float:
    """Norm of the gradient over a layer's matrices; `taylor` weighting multiplies each entry by its weight."""
    values = [
        gradient.double() * weight.double() if weighting == "taylor" else gradient.double()
        for gradient, weight in zip(gradients, weights, strict=True)
    ]
    if norm == "l1":
        return float(sum(value.abs().sum() for value in values))
    return float(sum(value.square().sum() for value in values)) ** 0.5


class DecisionWork(BaseModel):
    """What one backward pass took. One layer forward or backward is a pass of all samples through one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer_forwards: int
    """Recomputation included."""
    layer_backwards: int
    seconds: float
    reused_layers: int
    """Layers whose outputs were known from the decision before, and were not computed again."""
    saved: float
    """Share of the time without reuse that reuse saves, at the mean time of a layer forward."""


class ScoringWork(Artifact):
    """What the decisions took, in order."""

    decisions: tuple[DecisionWork, ...]


class GradmapScore(Stage):
    """Rank layers by gradient magnitude and decide, one backward pass at a time, which to remove first."""

    name = "gradmap_score"
    parallel = True

    metric: Literal["gate_gradient", "update_gradient", "weight_gradient"] = Field(
        "gate_gradient",
        description="`gate_gradient`: |gradient · update| summed over tokens. `update_gradient`: the bound of it by norms. "
        "`weight_gradient`: norm of the gradient of the layer's matrices.",
    )
    norm: Literal["l1", "l2"] | None = Field(None, description="Norm of `weight_gradient`. Default: l2.")
    weighting: Literal["none", "taylor"] | None = Field(
        None, description="Weighting of `weight_gradient`: `taylor` multiplies gradients by weights. Default: none."
    )
    schedule: Literal["iterative", "one_shot"] = Field(
        "iterative", description="`iterative`: score again after each removal. `one_shot`: rank all layers once."
    )
    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the layers to prepare decisions for. Default: 0.25.")
    layers: int | None = Field(None, ge=1, description="Number of decisions to prepare, instead of `ratio`.")
    protect_first: int = Field(1, ge=0, description="Layers at the bottom that are never removed.")
    protect_last: int = Field(1, ge=0, description="Layers at the top that are never removed.")

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        scores: LayerScores
        work: ScoringWork

    @model_validator(mode="after")
    def _check_combinations(self) -> GradmapScore:
        if self.ratio is not None and self.layers is not None:
            raise ValueError("give 'ratio' or 'layers', not both")
        for option in ("norm", "weighting"):
            if getattr(self, option) is not None and self.metric != "weight_gradient":
                raise ValueError(f"{option!r} belongs to metric 'weight_gradient'; the metric is {self.metric!r}")
        return self

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        model = inputs.get("model")
        if model is None or model.layers is None:
            return {"scores": ScoresForecast(decisions=self.layers)}
        return {"scores": ScoresForecast(decisions=self._count_decisions(model.layers))}

    def inspect(self, inputs: Mapping[str, Any], survey: Survey) -> None:
        survey.check_gradients()

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        model, calibration = inputs.get("model"), inputs.get("calibration")
        if model is None or model.layers is None or calibration is None or calibration.sequence_length is None:
            return None
        rounds = self._count_decisions(model.layers) if self.schedule == "iterative" else 1
        weights = self.metric == "weight_gradient"
        return rehearsal.backward_sweeps(
            [model.layers - number for number in range(rounds)],
            calibration.samples,
            calibration.sequence_length,
            weight_gradients=weights,
            divisible=not weights,
        )

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.data import check_tokenizer

        check_tokenizer(inputs.calibration, inputs.model)
        count = self._count_decisions(len(inputs.model.layers))
        rounds = count if self.schedule == "iterative" else 1
        kept = list(inputs.model.layers)
        decisions: list[Decision] = []
        work: list[DecisionWork] = []
        scores: dict[int, float] = {}
        scorer = Scorer(self, inputs, context)
        with context.progress("score layers", rounds, "backward pass") as advance:
            for number in range(count):
                if number < rounds:
                    found = context.remember(self._key(inputs, kept), lambda: scorer.score(set(kept)))
                    scores = {int(layer): score for layer, score in found["scores"].items()}
                    work.append(DecisionWork.model_validate(found["work"]))
                    advance()
                decisions.append(self._decide(kept, scores, inputs.model.layers))
                kept.remove(decisions[-1].removed)
        context.note("least important layers, in order: " + ", ".join(str(decision.removed) for decision in decisions))
        return self.Outputs(
            scores=LayerScores(
                model=inputs.model.digest,
                method=self._method(),
                decisions=tuple(decisions),
                protected=self._protected(inputs.model.layers),
            ),
            work=ScoringWork(decisions=tuple(work)),
        )

    def score_layers(self, sweep: Sweep, group: Group) -> dict[int, float]:
        """Importance of every layer the sweep still has, from one backward pass; this process's share of it, where it is a sum."""
        if self.metric == "weight_gradient":
            return self._score_weights(sweep, group)
        importance: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float]
        importance = gate_importance if self.metric == "gate_gradient" else update_importance
        return {
            step.layer: sum(importance(visit.gradient, visit.output - visit.input, visit.mask) for visit in step)
            for step in sweep.backward()
        }

    def _score_weights(self, sweep: Sweep, group: Group) -> dict[int, float]:
        scores = {}
        for step in sweep.backward():
            for _ in step:
                pass
            matrices = [name for name, gradient in step.weight_gradients.items() if gradient.ndim >= 2]
            weights = [step.module.get_parameter(name).detach() for name in matrices]
            gradients = [group.sum(step.weight_gradients[name]) for name in matrices]
            scores[step.layer] = weight_importance(gradients, weights, self.norm or "l2", self.weighting or "none") / group.size
        return scores

    def _decide(self, kept: list[int], scores: dict[int, float], layers: tuple[int, ...]) -> Decision:
        protected = self._protected(layers)
        left = {layer: scores[layer] for layer in kept}
        free = {layer: score for layer, score in left.items() if layer not in protected}
        return Decision(removed=min(free, key=free.__getitem__), scores=left, unguarded=min(left, key=left.__getitem__))

    def _protected(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({*layers[: self.protect_first], *layers[len(layers) - self.protect_last :]}))

    def _count_decisions(self, depth: int) -> int:
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

    def _key(self, inputs: Inputs, kept: list[int]) -> dict[str, Any]:
        return {
            "model": inputs.model.digest,
            "calibration": inputs.calibration.digest,
            "kept": list(kept),
            "metric": [self.metric, self.norm, self.weighting],
        }

    def _method(self) -> str:
        details = [self.norm or "l2", self.weighting or "none"] if self.metric == "weight_gradient" else []
        return " ".join([self.metric, *details, self.schedule])


class Scorer:
    """Scores the layers that are left, one decision after another; the next starts from what the last leaves valid."""

    def __init__(self, stage: GradmapScore, inputs: GradmapScore.Inputs, context: Context) -> None:
        self.stage, self.inputs, self.context = stage, inputs, context
        self._sweeps: PartedSweep | None = None
        self._left: set[int] = set()

    def score(self, kept: set[int]) -> dict[str, Any]:
        """Importance by layer, and the work it took, as JSON."""
        started = time.perf_counter()
        sweeps = self._sweeps_of(kept)
        before = sweeps.layer_forwards, sweeps.layer_backwards
        scores: dict[int, float] = dict.fromkeys(kept, 0.0)
        reused, forward_seconds = 0, 0.0
        for sweep in sweeps:
            reused = sweep.done
            since = time.perf_counter()
            sweep.run_forward()
            forward_seconds += time.perf_counter() - since
            for layer, score in self.stage.score_layers(sweep, self.context.group).items():
                scores[layer] += score
        scores = self.context.group.sum_values(scores)
        broken = [layer for layer, score in sorted(scores.items()) if not math.isfinite(score)]
        if broken:
            raise StageError(
                f"the score of layer {broken[0]} is not a finite number; the model overflows in {self.context.dtype}: "
                "use --dtype float32 or bfloat16"
            )
        seconds = time.perf_counter() - started
        saved = forward_seconds / max(1, len(kept) - reused) * reused
        work = DecisionWork(
            layer_forwards=sweeps.layer_forwards - before[0],
            layer_backwards=sweeps.layer_backwards - before[1],
            seconds=seconds,
            reused_layers=reused,
            saved=saved / (seconds + saved),
        )
        return {"scores": scores, "work": work.model_dump()}

    def _sweeps_of(self, kept: set[int]) -> PartedSweep:
        from gradmap_pipeline.model.parts import PartedSweep

        if self._sweeps is None:
            model = self.inputs.model
            self._sweeps = PartedSweep(
                model.without_layers(set(model.layers) - kept) if kept < set(model.layers) else model,
                *map(self.context.group.share, self.inputs.calibration.load()),
                device=self.context.device,
                dtype=self.context.dtype,
                memory=self.context.memory,
                folder=self.context.folder,
                weight_gradients=self.stage.metric == "weight_gradient",
                group=self.context.group,
                divisible=self.stage.metric != "weight_gradient",
            )
            self._left = set(kept)
        for layer in self._left - kept:
            self._sweeps.remove(layer)
        self._left = set(kept)
        return self._sweeps


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [GradmapScore]
