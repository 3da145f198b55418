"""What a plan knows of a model before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel


class ModelForecast(BaseModel):
    """What a plan knows of a model before anything runs. None: not known yet."""

    layers: int | None = None
    kept: tuple[int, ...] | None = None
    """Base layers that are left."""
    positions: int | None = None
    """Longest sequence the model is made for, in tokens."""
    config: dict[str, Any] | None = None
    """config.json of the whole model; of its text decoder, where it has other parts."""
    folder: Path | None = None
    """The base model's folder."""
    dtype: str | None = None
    """The type that its weights get, as `bfloat16`, where the recipe names one; else they stay as they are stored."""

    def explain_unusable(self) -> str | None:
        """Why no program of this machine can run it; None where one can, or that is not known."""
        return None
