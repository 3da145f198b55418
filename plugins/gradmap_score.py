"""GradMAP's first stage: layer importance from gradient magnitudes, one backward pass per pruning decision.

Source: https://arxiv.org/abs/2602.14649
Sizes: B sequences, T tokens, D hidden. h_l enters layer l, u_l = layer_l(h_l) - h_l is its residual update,
the loss is the mean next-token cross-entropy over the calibration set.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from gradmap_pipeline import (
    Context,
    Decision,
    Estimate,
    Forecasts,
    LayerScoring,
    Measure,
    ModelCosts,
    ProcessGroup,
    SamplePass,
    Stage,
    StructureProbe,
    hookimpl,
    take_lowest,
)

if TYPE_CHECKING:
    import torch


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
    norm_of_all: float = float(sum(value.square().sum() for value in values)) ** 0.5
    return norm_of_all


class GradmapScore(LayerScoring):
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

    sample_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the calibration samples that layers are scored on. A ranking needs fewer than a "
        "correction, which uses all.",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> GradmapScore:
        for option in ("norm", "weighting"):
            if getattr(self, option) is not None and self.metric != "weight_gradient":
                raise ValueError(f"{option!r} belongs to metric 'weight_gradient'; the metric is {self.metric!r}")
        return self

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_gradients()

    def estimate_sweeps(self, depth: int, samples: int, tokens: int, costs: ModelCosts) -> Estimate | None:
        rounds = self.count_decisions(depth) if self.schedule == "iterative" else 1
        uses_weights = self.metric == "weight_gradient"
        depths = [depth - number for number in range(rounds)]
        used = math.ceil(self.sample_share * samples)
        return costs.backward_sweeps(depths, used, tokens, weight_gradients=uses_weights, divisible=not uses_weights)

    def decide(self, kept: Sequence[int], scores: dict[int, float], wanted: int, protected: Collection[int]) -> list[Decision]:
        return take_lowest(kept, scores, 1 if self.schedule == "iterative" else wanted, protected)

    def measure(self, context: Context) -> Measure:
        uses_weights = self.metric == "weight_gradient"
        of = partial(self._score_weights, context.group) if uses_weights else self._score_updates
        key = [self.metric, self.norm, self.weighting, self.sample_share]
        return Measure(of, key, need="weight gradients" if uses_weights else "backward", sample_share=self.sample_share)

    def describe(self) -> str:
        details = [self.norm or "l2", self.weighting or "none"] if self.metric == "weight_gradient" else []
        return " ".join([self.metric, *details, self.schedule])

    def _score_updates(self, sweep: SamplePass) -> dict[int, float]:
        importance = gate_importance if self.metric == "gate_gradient" else update_importance
        return {
            step.layer: sum(importance(visit.gradient, visit.output - visit.input, visit.mask) for visit in step)
            for step in sweep.backward()
        }

    def _score_weights(self, group: ProcessGroup, sweep: SamplePass) -> dict[int, float]:
        scores = {}
        for step in sweep.backward():
            for _ in step:
                pass
            matrices = [name for name, gradient in step.weight_gradients.items() if gradient.ndim >= 2]
            weights = [step.module.get_parameter(name).detach() for name in matrices]
            with group.at(f"layer {step.layer}"):
                gradients = [group.sum(step.weight_gradients[name]) for name in matrices]
            scores[step.layer] = weight_importance(gradients, weights, self.norm or "l2", self.weighting or "none") / group.size
        return scores


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [GradmapScore]
