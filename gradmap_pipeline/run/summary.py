"""The result of a run in two tables: what each model is worth, and what each step cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..artifacts import Artifact, Evaluation
from ..checkpoint.model import Model
from ..export.exports import Export
from .events import StepFinished


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
    perplexity: dict[str, float]
    """By data set, and by how it was cut into samples where one data set was cut in several ways."""


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

    @property
    def datasets(self) -> list[str]:
        """Names of all data sets some model was evaluated on."""
        return list(dict.fromkeys(name for row in self.models for name in row.perplexity))

    def closed_gaps(self) -> list[tuple[str, ModelRow, float]]:
        """By data set: a model corrected after pruning, and the share of the log-perplexity gap its correction closed."""
        closed = []
        for name in self.datasets:
            rows = [row for row in self.models if name in row.perplexity]
            dense = next((row for row in rows if not row.removed and not row.patched), None)
            for pruned, corrected in pairwise(rows):
                if dense is None or not pruned.removed or pruned.kept != corrected.kept or pruned.patched >= corrected.patched:
                    continue
                gap = math.log(pruned.perplexity[name] / dense.perplexity[name])
                if gap > 0:
                    closed.append((name, corrected, math.log(pruned.perplexity[name] / corrected.perplexity[name]) / gap))
        return closed


def summarise(outputs: Mapping[str, Mapping[str, Artifact]], finished: list[StepFinished]) -> Summary:
    """Collect the models and evaluations of a run, in the order in which they came to be."""
    models: dict[str, tuple[str, Model | Export]] = {}
    evaluations: list[Evaluation] = []
    for step, artifacts in outputs.items():
        for artifact in artifacts.values():
            if isinstance(artifact, Model | Export):
                models.setdefault(artifact.digest, (step, artifact))
            elif isinstance(artifact, Evaluation):
                evaluations.append(artifact)
    names = name_settings(evaluations)
    rows = []
    for digest, (step, model) in models.items():
        found = [evaluation for evaluation in evaluations if evaluation.model == digest]
        graph = model.graph
        if graph is not model and not found:
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
                perplexity={names[setting_of(evaluation)]: evaluation.perplexity for evaluation in found},
            )
        )
    return Summary(rows, [StepRow(step.step, step.stage, step.seconds, step.cached) for step in finished])


def setting_of(evaluation: Evaluation) -> tuple[str, int, int]:
    """What an evaluation was made on: data set, samples, length."""
    return evaluation.dataset, evaluation.samples, evaluation.sequence_length


def name_settings(evaluations: list[Evaluation]) -> dict[tuple[str, int, int], str]:
    """The name of the data set, with samples and length where that alone says too little."""
    settings = list(dict.fromkeys(map(setting_of, evaluations)))
    datasets = [dataset for dataset, _, _ in settings]
    return {
        (dataset, samples, length): dataset if datasets.count(dataset) == 1 else f"{dataset}, {samples} x {length} tokens"
        for dataset, samples, length in settings
    }
