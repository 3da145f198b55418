"""What a page shows, read from the lineage of an export or from the record of a run.

What does not have the form of a view is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..artifacts import PAGE
from ..metrics import Metric
from .views import Base, Correction, File, Folder, Limit, ModelLine, Ranking, Shown, Step, read, read_all


@dataclass(frozen=True)
class Facts:
    """All that a page shows."""

    base: Base
    kept: tuple[int, ...]
    """Base layers of the last model."""
    models: list[ModelLine]
    """The unpruned model first."""
    steps: list[Step]
    made_by: str
    versions: dict[str, str]
    patched: tuple[str, ...] = ()
    """Names of corrected tensors."""
    files: dict[str, File] = field(default_factory=dict)
    """Of an export; of a run, by step."""
    difference: float | None = None
    """Largest difference between the logits of an export and of the model it was made from."""
    quantisation: str = ""
    recipe: str = ""
    """Text of the recipe."""
    recipe_name: str = ""
    overrides: tuple[str, ...] = ()
    limits: list[Limit] = field(default_factory=list)
    failure: str = ""
    """Why a run was stopped; empty where it reached its end."""
    ended_at: str = ""
    seconds: float | None = None
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def removed(self) -> list[int]:
        """Base layers left out."""
        return sorted(set(range(self.base.layers)) - set(self.kept))

    @property
    def columns(self) -> list[str]:
        """Columns of all metrics that some model has."""
        return list(dict.fromkeys(column for model in self.models for column in model.metrics))

    @property
    def ranking(self) -> Ranking | None:
        """The last ranking on the way to the model."""
        return next(reversed([ranking for _, ranking in self.find(Ranking)]), None)

    @property
    def correction(self) -> Correction | None:
        """The last correction."""
        return next(reversed([correction for _, correction in self.find(Correction)]), None)

    def find(self, view: type[Shown]) -> Iterator[tuple[Step, Shown]]:
        """Each output of a step that has the form of this view."""
        for step in self.steps:
            for output in step.outputs.values():
                shown = read(view, output)
                if shown is not None:
                    yield step, shown


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: Any) -> dict[str, str]:
    return {str(name): str(text) for name, text in _mapping(value).items()}


def facts_of_lineage(lineage: Mapping[str, Any]) -> Facts | None:
    """What the lineage of an export, `gradmap.json`, says; None where it is of something else, such as a comparison."""
    base = read(Base, lineage.get("base"))
    kept = lineage.get("layers_kept")
    if base is None or not isinstance(kept, list | tuple):
        return None
    columns = {_name_column(metric): metric for metric in read_all(Metric, lineage.get("metrics"))}
    whole = {_name_column(metric): metric for metric in read_all(Metric, lineage.get("base_metrics"))}
    dense = ModelLine(label="dense", layers=base.layers, parameters=base.parameters, bytes=base.bytes, metrics=whole)
    made = read(ModelLine, {**_mapping(lineage.get("model")), "layers": len(kept)}) or ModelLine(label="made", layers=len(kept))
    files = {str(name): read(File, file) for name, file in _mapping(lineage.get("files")).items()}
    difference = lineage.get("max_logit_difference")
    return Facts(
        base=base,
        kept=tuple(layer for layer in kept if isinstance(layer, int)),
        models=[dense, made.model_copy(update={"metrics": columns})],
        steps=[step.model_copy(update={"seconds": None}) for step in read_all(Step, lineage.get("steps"))],
        made_by=str(lineage.get("made_by", "")),
        versions=_texts(lineage.get("versions")),
        patched=tuple(map(str, _mapping(lineage.get("patched")))),
        files={name: file for name, file in files.items() if file is not None and name != PAGE},
        difference=difference if isinstance(difference, float) else None,
        quantisation=str(lineage.get("quantisation") or ""),
    )


def facts_of_run(record: Mapping[str, Any]) -> Facts | None:
    """What the record of a run says; None where it is of another form."""
    base = read(Base, record.get("base"))
    models = read_all(ModelLine, record.get("models"))
    if base is None or not models:
        return None
    facts = Facts(
        base=base,
        kept=tuple(record["kept"]),
        models=models,
        steps=read_all(Step, record["steps"]),
        made_by=record["made_by"],
        versions=_texts(record["versions"]),
        patched=tuple(record["patched"]),
        recipe=record["recipe"],
        recipe_name=record["recipe_name"],
        overrides=tuple(record["overrides"]),
        limits=read_all(Limit, record["limits"]),
        failure=record["failure"],
        ended_at=record["ended_at"],
        seconds=record["seconds"],
        machine=_texts(record["machine"]),
    )
    files = {f"{step.id}: {name}": file for step, folder in facts.find(Folder) for name, file in folder.files.items()}
    return replace(facts, files=files)


def _name_column(metric: Metric) -> str:
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.name}{f' on {metric.place}' if metric.place else ''}{unit}"


def show_metric(metric: Metric) -> str:
    """The value, its standard error or the range of its rounds, and its unit."""
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{metric.figure}{unit}"
