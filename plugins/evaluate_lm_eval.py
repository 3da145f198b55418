"""Measure a model on tasks of the Language Model Evaluation Harness: from the hub, or from a folder of one's own.

Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gradmap_pipeline import (
    Artifact,
    Context,
    Forecasts,
    Metric,
    ModelGraph,
    OptionError,
    Outlook,
    Stage,
    StageError,
    StructureProbe,
    TransformersFolder,
    hookimpl,
)
from gradmap_pipeline.tasks import TaskFolder

_RESAMPLES = 1000  # of documents, for the standard error of metrics that have no formula for it


_SHOWN = 5  # faults of tasks told at once


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
        if self.task_folder is not None:
            self._check_folder(self.task_folder)
        return {}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        from gradmap_pipeline.tasks.harness import try_tasks

        tasks, manager = self._find_tasks()
        if self.task_folder is not None:
            try_tasks(manager, self.task_folder, tasks, allow_code=self.allow_code)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.data import load_tokenizer
        from gradmap_pipeline.tasks.guard import guarded
        from gradmap_pipeline.tasks.harness import make_harness, quietly

        model = inputs.model
        graph = model.graph
        tasks, manager = self._find_tasks()
        harness: Any = None
        scores: list[TaskScore] = []
        with context.progress("lm-eval", len(tasks), "task") as advance:
            for task in tasks:

                def measure(task: str = task) -> list[dict[str, Any]]:
                    nonlocal harness
                    with quietly(), guarded(self.task_folder, allow_code=self.allow_code):
                        harness = harness or make_harness(model, load_tokenizer(graph.base), self.batch_size, context)
                        return self._measure(harness, task, manager, context.seed)

                key = {
                    "model": model.model_copy(update={"label": ""}).content() if model is graph else model.content(),
                    "task": task,
                    "fewshot": self.fewshot,
                    "samples": self.samples,
                    "folder": None if self.task_folder is None else self.task_folder.fingerprint(_digest),
                    "seed": context.seed,
                    "allow_code": self.allow_code,
                }
                scores += [TaskScore.model_validate(score) for score in context.remember(key, measure)]
                advance()
        for score in scores:
            context.note(f"{score.task}: {', '.join(f'{metric.name} {metric.figure}' for metric in score.list_metrics())}")
        return self.Outputs(task_scores=TaskScores(model=model.digest, label=model.label, scores=tuple(scores)))

    def _check_folder(self, folder: TaskFolder) -> None:
        """Raise `OptionError` where the folder cannot be read, or would have Python run that nobody allowed."""
        from gradmap_pipeline.tasks.checks import find_faults

        try:
            code = [] if self.allow_code else list(folder.find_code())
            faults = [] if code else list(find_faults(folder, self.tasks, allow_code=self.allow_code))
            folder.outside_files()
        except (ValueError, OSError) as error:
            raise OptionError("task_folder", str(error)) from error
        if code:
            others = f" (and {len(code) - 1} more)" if len(code) > 1 else ""
            advice = "read it, and set `allow_code: true` if it may run"
            raise OptionError("task_folder", f"would run Python code: {code[0]}{others}; {advice}")
        if faults:
            others = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise OptionError("task_folder", "; ".join(faults[:_SHOWN]) + others)

    def _find_tasks(self) -> tuple[list[str], Any]:
        """The tasks that the names stand for, and lm-eval's manager of them. Raises `OptionError`."""
        from gradmap_pipeline.machine.digests import sha256_of_value
        from gradmap_pipeline.recipe.validation import suggest
        from gradmap_pipeline.tasks.harness import open_manager

        if self.task_folder is not None:
            self._check_folder(self.task_folder)
        folder = None if self.task_folder is None else str(self.task_folder.root.resolve())
        content = None if self.task_folder is None else sha256_of_value(self.task_folder.fingerprint(_digest))
        manager = None if folder is None else open_manager(folder, content, defaults=False)
        if manager is None or not set(self.tasks) <= set(manager.all_tasks):
            manager = open_manager(folder, content, defaults=True)
        for task in self.tasks:
            if task not in manager.all_tasks:
                near = suggest(task, manager.all_tasks)
                advice = near if near.startswith("did") else "`lm-eval ls tasks` lists those it has; yours go into 'task_folder'"
                raise OptionError("tasks", f"lm-eval has no task {task!r}; {advice}")
        return list(self.tasks), manager

    def _measure(self, harness: Any, task: str, manager: Any, seed: int) -> list[dict[str, Any]]:
        import lm_eval

        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=[task],
            task_manager=manager,
            num_fewshot=self.fewshot,
            limit=self.samples,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed % 2**32,  # it takes no more
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        return [make_score(name, found).model_dump() for name in found["results"]]


def make_score(task: str, found: Mapping[str, Any]) -> TaskScore:
    """One task's part of what `simple_evaluate` returns. Its keys are `metric,filter`; filter `none` is left out here."""
    results = {key.removesuffix(",none"): value for key, value in found["results"][task].items() if isinstance(value, float)}
    deviations = {key.replace("_stderr", "", 1): value for key, value in results.items() if "_stderr" in key}
    errors = {key: value for key, value in deviations.items() if math.isfinite(value)}  # of one document there is none
    metrics = {key: value for key, value in results.items() if "_stderr" not in key}
    broken = next((key for key, value in metrics.items() if not math.isfinite(value)), None)
    if broken is not None:
        raise StageError(
            f"lm-eval's {task}.{broken} is {metrics[broken]}, not a finite number: the model computes values that are not, or "
            "gives the right answers no probability at all; use evaluate to see which"
        )
    directions = found["higher_is_better"].get(task, {})
    higher = {key: directions[key.partition(",")[0]] for key in metrics if directions.get(key.partition(",")[0]) is not None}
    samples = found["n-samples"].get(task, {}).get("effective", 0)
    fewshot = found.get("n-shot", {}).get(task)
    return TaskScore(
        task=task,
        metrics=metrics,
        errors=errors,
        higher_is_better=higher,
        samples=samples,
        fewshot=fewshot if isinstance(fewshot, int) else None,
        version=str(found["versions"].get(task, "")),
    )


def _digest(file: Path) -> str:
    from gradmap_pipeline.machine.digests import sha256_of

    return sha256_of(file)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [EvaluateLmEval]
