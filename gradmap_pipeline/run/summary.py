"""The result of a run in tables: what each model is worth, and what each step cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..artifacts import Artifact
from ..checkpoint.model import Model
from ..export.exports import Export
from ..export.speed import Speed
from ..metrics import Metric
from .events import StepFinished
from .measured import Measured, name_columns


@dataclass(frozen=True)
class ModelRow:
    """One model of the run."""

    label: str
    step: str
    """The step that made it."""
    layers: int
    kept: tuple[int, ...]
    """Base layers."""
    removed: int
    patched: int
    """Tensors that differ from the base model's."""
    parameters: int
    bytes: int
    metrics: dict[str, Metric]
    """Metrics by column, as `name_columns` names them: `perplexity on text`."""


@dataclass(frozen=True)
class StepRow:
    """One step of the run."""

    step: str
    stage: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Summary:
    """What a run comes to."""

    models: list[ModelRow]
    steps: list[StepRow]
    remarks: list[str] = field(default_factory=list)
    """Of the metrics that hold for one machine: how, where and when they were measured."""

    @property
    def columns(self) -> list[str]:
        """Columns of all metrics that some model has."""
        return list(dict.fromkeys(column for row in self.models for column in row.metrics))

    def closed_gaps(self) -> list[tuple[str, ModelRow, float]]:
        """By text: a model corrected after pruning, and the share that its correction closed of the gap in log-perplexity that
        opened when its layers were removed. Shares of corrections that follow each other add up."""
        closed = []
        for column in self.columns:
            rows = [row for row in self.models if column in row.metrics]
            values = [row.metrics[column].value for row in rows]
            dense = next((row for row in rows if not row.removed and not row.patched), None)
            if dense is None or rows[0].metrics[column].name != "perplexity" or min(values) <= 0:
                continue
            for (pruned, before), (corrected, after) in pairwise(zip(rows, values, strict=True)):
                if not pruned.removed or pruned.kept != corrected.kept or pruned.patched >= corrected.patched:
                    continue
                opened = next(value for row, value in zip(rows, values, strict=True) if row.removed and row.kept == corrected.kept)
                gap = math.log(opened / dense.metrics[column].value)
                if gap > 0:
                    closed.append((column.removeprefix("perplexity on "), corrected, math.log(before / after) / gap))
        return closed


def summarise(outputs: Mapping[str, Mapping[str, Artifact]], measured: Sequence[Measured], finished: list[StepFinished]) -> Summary:
    """Collect the models and metrics of a run, in the order in which they came to be."""
    models: dict[str, tuple[str, Model | Export]] = {}
    for step, artifacts in outputs.items():
        for artifact in artifacts.values():
            if isinstance(artifact, Model | Export):
                models.setdefault(artifact.digest, (step, artifact))
    columns = name_columns(measured)
    rows = []
    for digest, (step, model) in models.items():
        metrics = {column: one.metric for column, one in zip(columns, measured, strict=True) if one.metric.model == digest}
        graph = model.graph
        if graph is not model and not metrics:
            continue  # the same model in another form, and nothing new to say of it
        rows.append(
            ModelRow(
                label=model.label,
                step=step,
                layers=len(graph.layers),
                kept=graph.layers,
                removed=len(graph.removed),
                patched=len(graph.patches),
                parameters=graph.count_parameters(),
                bytes=model.size_bytes,
                metrics=metrics,
            )
        )
    speeds = [(step, one) for step, given in outputs.items() for one in given.values() if isinstance(one, Speed)]
    remarks = [f"{step}: {speed.describe()}" for step, speed in speeds]
    return Summary(rows, [StepRow(step.step, step.stage, step.seconds, step.cached) for step in finished], remarks)
