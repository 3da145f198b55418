"""Measure a model on tasks of the Language Model Evaluation Harness: from the hub, or from a folder of one's own.

Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gradmap_pipeline import (
    Artifact,
    Context,
    Forecasts,
    Metric,
    ModelGraph,
    Outlook,
    Stage,
    StageError,
    StructureProbe,
    TaskFolder,
    TaskHarness,
    TransformersFolder,
    hookimpl,
)


class TaskScore(BaseModel):
    """What a model reaches on one task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metrics: dict[str, float]
    """By lm-eval's name of the metric, and of its filter where there is one: `acc`, `exact_match,strict-match`."""
    errors: dict[str, float]
    """Standard errors, where there are any."""
    higher_is_better: dict[str, bool]
    samples: int
    fewshot: int | None = None
    """Solved examples before each question."""
    version: str

    def list_metrics(self) -> list[Metric]:
        """Each with the task as what it was measured on."""
        counts = [f"{self.samples} questions"] if self.samples else []  # a group has none of its own
        setting = ", ".join(counts if self.fewshot is None else [*counts, f"{self.fewshot}-shot"])
        return [
            Metric(
                name=name,
                value=value,
                better="higher" if self.higher_is_better.get(name, True) else "lower",
                stderr=self.errors.get(name),
                on=self.task,
                setting=setting,
            )
            for name, value in self.metrics.items()
        ]


class TaskScores(Artifact):
    """What a model reaches on the tasks of a harness."""

    model: str
    """Digest of the model."""
    label: str
    scores: tuple[TaskScore, ...]

    def list_metrics(self) -> list[Metric]:
        return [metric for score in self.scores for metric in score.list_metrics()]


class EvaluateLmEval(Stage):
    """Measure the model on lm-eval tasks."""

    name = "evaluate_lm_eval"
    libraries = ("torch", "transformers", "tokenizers", "datasets", "lm_eval")
    requires = ("lm_eval",)
    extra = "lm-eval"

    tasks: list[str] = Field(description="Names of tasks or groups of tasks.", min_length=1)
    task_folder: TaskFolder | None = Field(
        None, description="Folder with tasks of your own, as lm-eval's YAML files; they may name data on this machine."
    )
    allow_code: bool = Field(
        False, description="Run Python that the tasks of `task_folder` name (`!function`, other people's metrics and templates)."
    )
    fewshot: int | None = Field(None, ge=0, description="Solved examples before each question. Default: what the task says.")
    samples: int | None = Field(None, ge=1, description="Questions of each task, its first. Default: all.")
    batch_size: int = Field(8, ge=1, description="Sequences that go through the model together.")

    class Inputs(BaseModel):
        model: ModelGraph | TransformersFolder

    class Outputs(BaseModel):
        task_scores: TaskScores

    def forecast(self, inputs: Forecasts) -> Outlook:
        self._harness.check_folder()
        return {}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        self._harness.try_tasks()

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model = inputs.model
        harness = self._harness
        manager = harness.find_manager()
        loaded: Any = None
        scores: list[TaskScore] = []
        with context.progress("lm-eval", len(self.tasks), "task") as advance:
            for task in self.tasks:

                def measure(task: str = task) -> list[dict[str, Any]]:
                    nonlocal loaded
                    loaded = loaded or harness.load(model, self.batch_size, context)
                    results = harness.measure(loaded, task, manager, self.fewshot, self.samples, context.seed)
                    return [make_score(name, results).model_dump() for name in results["results"]]

                key = {
                    "model": model.model_copy(update={"label": ""}).content() if model is model.graph else model.content(),
                    "task": task,
                    "fewshot": self.fewshot,
                    "samples": self.samples,
                    "folder": harness.fingerprint(),
                    "seed": context.seed,
                    "allow_code": self.allow_code,
                }
                scores += [TaskScore.model_validate(score) for score in context.remember(key, measure)]
                advance()
        for score in scores:
            context.note(f"{score.task}: {', '.join(f'{metric.name} {metric.figure}' for metric in score.list_metrics())}")
        return self.Outputs(task_scores=TaskScores(model=model.digest, label=model.label, scores=tuple(scores)))

    @property
    def _harness(self) -> TaskHarness:
        return TaskHarness(self.tasks, self.task_folder, self.allow_code)


def make_score(task: str, report: Mapping[str, Any]) -> TaskScore:
    """One task's part of what `simple_evaluate` returns. Its keys are `metric,filter`; filter `none` is left out here."""
    results = {key.removesuffix(",none"): value for key, value in report["results"][task].items() if isinstance(value, float)}
    deviations = {key.replace("_stderr", "", 1): value for key, value in results.items() if "_stderr" in key}
    errors = {key: value for key, value in deviations.items() if math.isfinite(value)}  # of one document there is none
    metrics = {key: value for key, value in results.items() if "_stderr" not in key}
    broken = next((key for key, value in metrics.items() if not math.isfinite(value)), None)
    if broken is not None:
        raise StageError(
            f"lm-eval's {task}.{broken} is {metrics[broken]}, not a finite number: the model computes values that are not, or "
            "gives the right answers no probability at all; use evaluate to see which"
        )
    directions = report["higher_is_better"].get(task, {})
    higher = {key: directions[key.partition(",")[0]] for key in metrics if directions.get(key.partition(",")[0]) is not None}
    samples = report["n-samples"].get(task, {}).get("effective", 0)
    fewshot = report.get("n-shot", {}).get(task)
    return TaskScore(
        task=task,
        metrics=metrics,
        errors=errors,
        higher_is_better=higher,
        samples=samples,
        fewshot=fewshot if isinstance(fewshot, int) else None,
        version=str(report["versions"].get(task, "")),
    )


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [EvaluateLmEval]
