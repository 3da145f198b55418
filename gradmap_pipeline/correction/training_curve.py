"""How losses fell while a model was trained as a whole, in few points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

POINTS = 60
"""The most points that a curve has, besides those where held-out samples were looked at."""


class TrainingPoint(BaseModel):
    """One point of a training curve. Losses are means over tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: int
    loss: float | None = None
    """Mean over the steps since the last point that has one; None where none was taken."""
    learning_rate: float | None = None
    """Learning rate of the step."""
    held_out: float | None = None
    """Loss on held-out samples, where they were looked at."""


def thin_out(history: Sequence[Mapping[str, Any]], steps: int) -> tuple[TrainingPoint, ...]:
    """Points from what transformers' trainer logged: `loss` and `learning_rate` of each step, and `eval_loss` of each look.

    `steps`: that were wanted. A point stands for as many steps as leave `POINTS` of them, or less.
    """
    every = -(-steps // POINTS)
    looks = {int(entry["step"]): float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}
    taken = {int(entry["step"]): entry for entry in history if "loss" in entry}
    last = max([*looks, *taken], default=0)
    points, losses = [], []
    for step in sorted({*looks, *taken}):
        entry = taken.get(step, {})
        losses += [float(entry["loss"])] if entry else []
        if step in looks or step % every == 0 or step == last:
            mean = sum(losses) / len(losses) if losses else None
            points.append(TrainingPoint(step=step, loss=mean, learning_rate=entry.get("learning_rate"), held_out=looks.get(step)))
            losses = []
    return tuple(points)
