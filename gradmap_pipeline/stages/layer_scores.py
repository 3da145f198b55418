"""Which layers a ranking would remove, in which order and by which scores, and what a plan knows of that."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ..artifacts import Artifact


class ScoresForecast(BaseModel):
    """What a plan knows of layer scores before anything runs. None: not known yet."""

    decisions: int | None = None
    all_or_nothing: bool = False
    removable: int | None = None
    """Layers that are not protected."""


class Decision(BaseModel):
    """One pruning decision: the scores of the layers that were left, and the one chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    removed: int
    """Base layer chosen by this decision."""
    scores: dict[int, float]
    """Importance by base layer, for the layers still there that were scored. Higher means keep."""
    removed_if_unprotected: int
    """Base layer that the ranking alone, without protected layers, would have chosen."""


class LayerScores(Artifact):
    """Pruning decisions in order; removing n layers takes the first n."""

    Forecast = ScoresForecast

    model: str
    """Digest of the model that was scored."""
    method: str
    """How the scores were made, for people and reports."""
    decisions: tuple[Decision, ...]
    protected: tuple[int, ...] = ()
    """Base layers that are not to be removed, whatever their score."""
    all_or_nothing: bool = False
    """Whether the decisions are one choice, of layers that are only worth removing all together."""

    @property
    def order(self) -> tuple[int, ...]:
        """Base layers, least important first."""
        return tuple(decision.removed for decision in self.decisions)
