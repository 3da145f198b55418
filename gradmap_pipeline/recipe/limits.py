"""Limits of a step: which values of its metrics let the run go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..artifacts import Artifact
from ..checkpoint.graph import ModelGraph
from ..checkpoint.model import Model
from ..stages.stage import Stage
from .validation import suggest

if TYPE_CHECKING:
    from .recipe import RecipeStep

Bound = Literal["min", "max", "min_ratio", "max_ratio"]
BOUNDS: tuple[Bound, ...] = ("min", "max", "min_ratio", "max_ratio")


class Limit(BaseModel):
    """The values of a metric that pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: float | None = Field(None, description="Least value that passes.")
    max: float | None = Field(None, description="Largest value that passes.")
    min_ratio: float | None = Field(None, description="Least value that passes, relative to that of the unpruned model.")
    max_ratio: float | None = Field(None, description="Largest value that passes, relative to that of the unpruned model.")

    @model_validator(mode="before")
    @classmethod
    def _check_form(cls, data: Any) -> Any:
        if isinstance(data, int | float) and not isinstance(data, bool):
            raise ValueError(f"found {data:g}, accepted: a mapping, as in {{max: {data:g}}} or {{min: {data:g}}}")
        return data

    @model_validator(mode="after")
    def _check_bounds(self) -> Limit:
        if not self.bounds:
            raise ValueError(f"found no bound, accepted: {', '.join(BOUNDS)}, as in {{max: 30}}")
        for least, most in ((self.min, self.max), (self.min_ratio, self.max_ratio)):
            if least is not None and most is not None and least > most:
                raise ValueError(f"found {least:g} as the least value and {most:g} as the largest; no value passes")
        return self

    @property
    def bounds(self) -> dict[Bound, float]:
        """The bounds that are set."""
        return {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}

    @property
    def is_relative(self) -> bool:
        """Whether the unpruned model has to be measured, too."""
        return self.min_ratio is not None or self.max_ratio is not None


def find_faults(
    step: RecipeStep, stage: Stage, types: Mapping[str, type[Artifact]], measured: str | None
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Limits that cannot be held, by their place under the step's `limits`, as far as that is known before the run.

    `types`: of the step's outputs. `measured`: its input that is measured, as `find_measured_input` gives it.
    """
    known = stage.metric_names if any(has_metrics(cls) for cls in types.values()) else ()
    for title, limit in step.limits.items():
        if known is not None and title.partition(" on ")[0] not in known and title not in known:
            advice = suggest(title, known) if known else "none of its outputs has metrics"
            yield (title, next(iter(limit.bounds))), f"step {step.id!r} gives no metric {title!r}; {advice}"
        elif limit.is_relative and measured is None:
            bound = next(name for name in limit.bounds if name.endswith("_ratio"))
            message = "compares with the unpruned model, which can take the place of one input, and the step has no such input"
            yield (title, bound), f"step {step.id!r}: {bound!r} {message}, or several; use min or max"


def has_metrics(cls: type[Artifact]) -> bool:
    """Whether artifacts of this class can carry metrics."""
    return cls.list_metrics is not Artifact.list_metrics


def find_measured_input(
    stage: type[Stage], inputs: Mapping[str, tuple[str, str]], types: Mapping[tuple[str, str], Any]
) -> str | None:
    """The one input of a step whose place the unpruned model can take; None where there is none, or several.

    `types`: of all outputs of earlier steps.
    """
    accepted = stage.input_fields()
    candidates = [
        name
        for name, source in inputs.items()
        if issubclass(types[source], Model) and any(issubclass(ModelGraph, cls) for cls in accepted[name][0])
    ]
    return candidates[0] if len(candidates) == 1 else None
