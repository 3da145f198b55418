"""Hold the metrics of a step to the limits that the recipe sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import QualityError, StageError
from ..metrics import Metric, show_number
from ..recipe.limits import Bound, Limit


@dataclass(frozen=True)
class CheckedLimit:
    """A bound that the recipe sets, and how far a metric is from it."""

    metric: str
    """Its title: `perplexity on builtin heldout`."""
    model: str
    """Digest of the model."""
    bound: Bound
    limit: float
    value: float
    """Value of the metric; for `min_ratio` and `max_ratio`, relative to that of the unpruned model."""
    missed_by: float | None
    """How far the value is beyond the limit; None where it passes."""
    message: str
    """Says so in words."""


def check_limits(metrics: Sequence[Metric], limits: Mapping[str, Limit], base: Sequence[Metric] = ()) -> list[CheckedLimit]:
    """Each bound for each metric that it is set on. A limit on `acc` holds for all metrics of that name, on `acc on task` for one.

    `base`: metrics of the unpruned model, for bounds that are relative to it. Raises `StageError` where there is no such metric.
    """
    checked = []
    for title, limit in limits.items():
        named = [metric for metric in metrics if title in (metric.title, metric.name)]
        if not named:
            given = ", ".join(dict.fromkeys(metric.title for metric in metrics)) or "none"
            raise StageError(f"'limits' names {title!r}, which was not measured; measured: {given}")
        for metric in named:
            for bound, number in limit.bounds.items():
                checked.append(_check(metric, bound, number, base))
    return checked


def _check(metric: Metric, bound: Bound, limit: float, base: Sequence[Metric]) -> CheckedLimit:
    value, shown = metric.value, f"{metric.name} {metric.value:.4g}{_name_unit(metric)}{f' on {metric.on!r}' if metric.on else ''}"
    if bound in ("min_ratio", "max_ratio"):
        whole = _find_base(metric, base)
        value = metric.value / whole
        shown += f" is {value:.3f} times that of the unpruned model ({whole:.4g}),"
    else:
        shown += " is"
    beyond = limit - value if bound.startswith("min") else value - limit
    missed_by = None if beyond <= 0 else beyond
    side = "under" if bound.startswith("min") else "over"
    verdict = "within" if missed_by is None else side
    by = "" if missed_by is None else f" by {missed_by:.4g}"
    return CheckedLimit(metric.title, metric.model, bound, limit, value, missed_by, f"{shown} {verdict} {bound} {limit:g}{by}")


def _name_unit(metric: Metric) -> str:
    return f" {metric.unit}" if metric.unit else ""


def _find_base(metric: Metric, base: Sequence[Metric]) -> float:
    """The same metric of the unpruned model."""
    key = (metric.title, metric.setting)
    whole = next((one.value for one in base if (one.title, one.setting) == key), None)
    if whole is None:
        raise StageError(f"a ratio limits {metric.title!r}, which the step does not give for the unpruned model; use min or max")
    if whole == 0:
        raise StageError(f"a ratio limits {metric.title!r}, which is {show_number(0)} for the unpruned model; use min or max")
    return whole


def raise_missed(checked: Sequence[CheckedLimit]) -> None:
    """Raise `QualityError` where a limit is missed, with all that are."""
    missed = [limit.message for limit in checked if limit.missed_by is not None]
    if missed:
        raise QualityError("; ".join(missed) + "; remove fewer layers, calibrate on more text, quantise less, or change the limit")
