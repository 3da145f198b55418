"""Metrics that the steps of a run have given: read from artifacts, and named for the columns of tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..artifacts import Artifact
from ..errors import GradmapError, StageError, describe_value, name_error
from ..interruptions import is_interruption
from ..machine.streams import plugin_code
from ..metrics import Metric


@dataclass(frozen=True)
class Measured:
    """A metric, and where it comes from. Its field `model` is set."""

    step: str
    metric: Metric
    run: str = ""
    """Name of the run, where several are compared."""


def read_metrics(outputs: Mapping[str, Artifact]) -> list[Metric]:
    """The metrics that a step's outputs carry, each with its model. Raises `StageError` where what they say is not plain."""
    metrics: list[Metric] = []
    seen: set[tuple[str, ...]] = set()
    for output, artifact in outputs.items():
        for metric in _ask(output, artifact):
            model = metric.model or getattr(artifact, "model", None)
            if not isinstance(model, str) or not model:
                raise StageError(
                    f"its output {output!r} has the metric {metric.title!r} and does not say of which model; "
                    "give the metric the digest of the model as 'model'"
                )
            key = (metric.title, metric.setting, model)
            if key in seen:
                raise StageError(
                    f"its output {output!r} has the metric {metric.title!r} of a model that has it already; "
                    "give the two different names, or say what each was measured on"
                )
            seen.add(key)
            metrics.append(metric.model_copy(update={"model": model}))
    return metrics


def _ask(output: str, artifact: Artifact) -> Sequence[Metric]:
    """What `list_metrics` of an artifact returns, which may be code of a plugin."""
    try:
        with plugin_code():
            metrics = artifact.list_metrics()
    except GradmapError:
        raise
    except BaseException as error:
        if is_interruption(error):
            raise
        raise StageError(f"list_metrics() of its output {output!r} failed: {name_error(error)}") from error
    if not isinstance(metrics, list | tuple) or not all(isinstance(metric, Metric) for metric in metrics):
        raise StageError(f"list_metrics() of its output {output!r} must return a list of Metric, got {describe_value(metrics)}")
    return metrics


def name_columns(measured: Sequence[Measured]) -> list[str]:
    """The column of each metric in a table. Those in one column can be compared, and a model has one value there.

    `perplexity on text`; with how it was measured where that differs; with the step where that does not tell them apart.
    """
    units = [f" ({one.metric.unit})" if one.metric.unit else "" for one in measured]
    columns = [f"{one.metric.title}{unit}" for one, unit in zip(measured, units, strict=True)]
    for places in _group(columns):
        if len({measured[place].metric.setting for place in places}) > 1:
            for place in places:
                setting = measured[place].metric.setting
                columns[place] += f", {setting}" if setting else ""
    for places in _group(columns):
        values: defaultdict[tuple[str, str], set[Metric]] = defaultdict(set)
        for place in places:
            values[measured[place].run, measured[place].metric.model].add(measured[place].metric)
        ways = {measured[place].metric.better for place in places}
        if len(ways) > 1 or any(len(metrics) > 1 for metrics in values.values()):
            for place in places:
                columns[place] += f", step {measured[place].step}"
    return columns


def _group(columns: Sequence[str]) -> Iterator[list[int]]:
    """Places of equal names."""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, column in enumerate(columns):
        places[column].append(place)
    return iter(list(places.values()))
