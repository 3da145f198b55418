"""The window of layers across which hidden states turn least is removed as a whole.

Source: https://arxiv.org/abs/2403.17887 (Gromov et al.), with the last token's angle; all tokens as an option.
Sizes: B sequences, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from gradmap_pipeline import Context, Decision, LayerScoring, Measure, SamplePass, Stage, StageError, hookimpl

if TYPE_CHECKING:
    import torch


def angular_distance(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor, tokens: str) -> float:
    """Σ arccos(cos(h_l, h_{l+n})) / π over tokens, or over the last token of each sequence that is not padding.

    before, after (B, T, D); mask bool (B, T).
    """
    import torch
    import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by

    cosine = F.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)
    angles, mask = torch.arccos(cosine) / math.pi, mask.to(before.device)
    if tokens == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * places).argmax(dim=1)
        return float(angles.gather(1, last[:, None]).sum())
    return float((angles * mask).sum())


class AngularScore(LayerScoring):
    """Choose one run of neighbouring layers by the angle between what enters and what leaves it."""

    name = "angular_score"
    parallel = True
    all_or_nothing = True

    tokens: Literal["last", "all"] = Field("last", description="Tokens whose angle counts: the last of each sequence, or all.")
    protect_first: int = Field(0, ge=0, description="Layers at the bottom that are never removed.")
    protect_last: int = Field(0, ge=0, description="Layers at the top that are never removed.")

    def measure(self, context: Context) -> Measure:
        return Measure(self._measure_windows, [self.tokens, self.ratio, self.layers], keep="all")

    def describe(self) -> str:
        return f"angle across a window, {self.tokens} tokens"

    def decide(self, kept: Sequence[int], scores: dict[int, float], wanted: int, protected: Collection[int]) -> list[Decision]:
        """The window of the least angle; its layers count as that window, from the bottom up."""
        places = [place for place in range(len(kept) - wanted + 1) if not set(kept[place : place + wanted]) & set(protected)]
        if not places:
            raise StageError(f"no {wanted} neighbouring layers are free of protected ones; protect fewer, or remove fewer")
        best = min(places, key=lambda place: scores[kept[place]])
        unprotected = kept[min(range(len(kept) - wanted + 1), key=lambda place: scores[kept[place]])]
        chosen = kept[best : best + wanted]
        return [Decision(removed=layer, scores=scores, removed_if_unprotected=unprotected) for layer in chosen]

    def _measure_windows(self, sweep: SamplePass) -> dict[int, float]:
        """By the first layer of each window, the angle across it."""
        sweep.run_forward()
        size = self.count_decisions(len(sweep.layers))
        return {
            sweep.layers[start]: sum(
                angular_distance(sweep.boundary(start, index), sweep.boundary(start + size, index), batch.mask, self.tokens)
                for index, batch in enumerate(sweep.batches)
            )
            for start in range(len(sweep.layers) - size + 1)
        }


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [AngularScore]
