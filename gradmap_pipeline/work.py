"""How much a step has computed, and in which time."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from .artifacts import Artifact


class Round(BaseModel):
    """What one part of a step took. One layer forward or backward is a pass of all samples through one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer_forwards: float
    """Recomputation included; a pass of a share of the samples counts as that share."""
    layer_backwards: float
    seconds: float
    reused_layers: int = 0
    """Layers whose outputs were known from the round before, and were not computed again."""
    saved: float = 0.0
    """Share of the time without reuse that reuse saves, at the mean time of a layer forward."""


class Work(Artifact):
    """What a step took, part by part: pruning decisions in order, or all of a correction."""

    rounds: tuple[Round, ...] = ()

    @property
    def layer_evaluations(self) -> float:
        """Layer forwards and backwards."""
        return sum(part.layer_forwards + part.layer_backwards for part in self.rounds)
