"""Weights times their gradients: layers whose removal, to first order, changes the loss least.

Source: https://arxiv.org/abs/2402.02834 (Shortened LLaMA), Taylor+, whose `+` keeps the first four layers and the last two.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from gradmap_pipeline import (
    Context,
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
)

if TYPE_CHECKING:
    import torch


def taylor_importance(gradients: list[torch.Tensor], weights: list[torch.Tensor]) -> float:
    """Σ |w · ∂loss/∂w| over all entries of a layer; gradients are of the mean loss over all samples, summed before the modulus."""
    pairs = zip(gradients, weights, strict=True)
    return float(sum((gradient.double() * weight.double()).abs().sum() for gradient, weight in pairs))


class TaylorScore(LayerScoring):
    """Rank layers by weight times gradient, summed over a layer (Taylor+)."""

    name = "taylor_score"
    parallel = True

    protect_first: int = Field(4, ge=0, description="Layers at the bottom that are never removed.")
    protect_last: int = Field(2, ge=0, description="Layers at the top that are never removed.")

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_gradients()

    def estimate_sweeps(self, depth: int, samples: int, tokens: int, costs: ModelCosts) -> Estimate | None:
        return costs.backward_sweeps([depth], samples, tokens, weight_gradients=True, divisible=False)

    def measure(self, context: Context) -> Measure:
        return Measure(partial(measure_taylor, context.group), "taylor", need="weight gradients")

    def describe(self) -> str:
        return "taylor"


def measure_taylor(group: ProcessGroup, sweep: SamplePass) -> dict[int, float]:
    """Taylor importance of every layer, from one backward pass."""
    scores = {}
    for step in sweep.backward():
        for _ in step:
            pass
        names = sorted(step.weight_gradients)
        weights = [step.module.get_parameter(name).detach() for name in names]
        with group.at(f"layer {step.layer}"):
            gradients = [group.sum(step.weight_gradients[name]) for name in names]
        scores[step.layer] = taylor_importance(gradients, weights) / group.size
    return scores


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [TaylorScore]
