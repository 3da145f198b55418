"""ShortGPT: layers that turn the hidden states least are removed first.

Source: https://arxiv.org/abs/2403.03853, block influence, here summed over tokens instead of averaged; the order is the same.
Sizes: B sequences, T tokens, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from gradmap_pipeline import Context, LayerScoring, Measure, SamplePass, Stage, hookimpl

if TYPE_CHECKING:
    import torch


def block_influence(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> float:
    """Σ_t (1 - cos(h_{l,t}, h_{l+1,t})). before, after (B, T, D); mask bool (B, T)."""
    import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by

    turned = 1 - F.cosine_similarity(before.double(), after.double(), dim=-1)
    return float((turned * mask).sum())


class ShortgptScore(LayerScoring):
    """Rank layers by block influence: how far a layer turns the hidden states (ShortGPT)."""

    name = "shortgpt_score"
    parallel = True

    protect_first: int = Field(0, ge=0, description="Layers at the bottom that are never removed.")
    protect_last: int = Field(0, ge=0, description="Layers at the top that are never removed.")

    def measure(self, context: Context) -> Measure:
        return Measure(measure_influence, "block influence")

    def describe(self) -> str:
        return "block influence"


def measure_influence(sweep: SamplePass) -> dict[int, float]:
    """Block influence of every layer, from one forward pass."""
    return {step.layer: sum(block_influence(visit.input, visit.output, visit.mask) for visit in step) for step in sweep.forward()}


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ShortgptScore]
