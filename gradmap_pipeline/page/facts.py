"""What a page shows, read from the lineage of an export or from the record of a run.

Values come from files, and from artifacts that plugins define: what does not have the expected form is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..artifacts import PAGE
from ..errors import GradmapError
from ..metrics import Metric, show_number

_REPEATED_FROM = 0.5
"""Repetition from which an answer counts as one that repeats itself."""


_MOST_LAYERS = 10_000
Count = Annotated[int, Field(ge=0, le=10**18)]
Figure = Annotated[float, Field(ge=-1e100, le=1e100)]
"""Numbers that can be drawn and divided; anything beyond is no measurement."""


class _View(BaseModel):
    """The part of a recorded value that a page shows."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Decision(_View):
    """One pruning decision."""

    removed: Count
    scores: dict[int, Figure]


class Ranking(_View):
    """Pruning decisions in order."""

    method: str
    decisions: tuple[Decision, ...]
    protected: tuple[Count, ...] = ()


class Site(_View):
    """A place that was corrected."""

    layer: Count
    parameter: str
    role: str = "output"
    shift: Figure
    relative_shift: Figure
    missing_left: Figure


class Correction(_View):
    """Where a pruned model was corrected."""

    sites: tuple[Site, ...]
    shifts: dict[int, Figure]
    scales: dict[int, Figure] = {}


class Loss(_View):
    """How well a model predicts a text."""

    label: str
    dataset: str
    loss: Figure
    perplexity: Figure
    tokens: Count
    samples: Count
    sequence_length: Count
    base_perplexity: Figure | None = None


class Answer(_View):
    """What a model says to a prompt, and what the unpruned model says."""

    prompt: str
    answer: str
    base_answer: str
    repetition: Figure
    base_repetition: Figure

    @property
    def repeats(self) -> bool:
        """Whether half of the answer, or more, stood in it before."""
        return self.repetition >= _REPEATED_FROM

    @property
    def base_repeats(self) -> bool:
        """The same of the unpruned model's answer."""
        return self.base_repetition >= _REPEATED_FROM


class Answers(_View):
    """Answers to prompts."""

    answers: tuple[Answer, ...]
    tokens: Count


class File(_View):
    """A file of an export."""

    size: Count
    sha256: str


class Step(_View):
    """A step that ran. Times in seconds, memory in bytes."""

    id: str
    stage: str
    options: dict[str, Any]
    outputs: dict[str, Any]
    seconds: Figure | None = None
    """What the result took when it was computed."""
    peak_bytes: Count | None = None
    cached: bool = False


class Limit(_View):
    """A limit that the recipe sets."""

    step: str
    metric: str
    bound: str
    limit: Figure
    value: Figure
    missed_by: Figure | None


class ModelLine(_View):
    """One model: what was done to it, its size, and its metrics by column."""

    label: str
    layers: Count
    parameters: Count | None = None
    bytes: Count | None = None
    metrics: dict[str, Metric] = {}


class Base(_View):
    """The unpruned model."""

    name: str
    sha256: str
    layers: Annotated[int, Field(ge=1, le=_MOST_LAYERS)]
    parameters: Count | None = None
    bytes: Count | None = None


_Shown = TypeVar("_Shown", bound=BaseModel)


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
    """Of an export."""
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

    def find(self, view: type[_Shown]) -> Iterator[tuple[Step, _Shown]]:
        """Each output of a step that has the form of this view."""
        for step in self.steps:
            for output in step.outputs.values():
                shown = _read(view, output)
                if shown is not None:
                    yield step, shown


def _read(view: type[_Shown], value: Any) -> _Shown | None:
    """A recorded value in the form of a view; None where it has another."""
    try:
        return view.model_validate(value)
    except (ValidationError, GradmapError):
        return None


def _read_all(view: type[_Shown], values: Any) -> list[_Shown]:
    read = [_read(view, value) for value in (values if isinstance(values, list | tuple) else [])]
    return [shown for shown in read if shown is not None]


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: Any) -> dict[str, str]:
    return {str(name): str(text) for name, text in _mapping(value).items()}


def facts_of_lineage(lineage: Mapping[str, Any]) -> Facts | None:
    """What the lineage of an export, `gradmap.json`, says; None where it is of something else, such as a comparison."""
    base = _read(Base, lineage.get("base"))
    kept = lineage.get("layers_kept")
    if base is None or not isinstance(kept, list | tuple):
        return None
    columns = {_name_column(metric): metric for metric in _read_all(Metric, lineage.get("metrics"))}
    dense = ModelLine(label="dense", layers=base.layers, parameters=base.parameters, bytes=base.bytes)
    made = _read(ModelLine, {**_mapping(lineage.get("model")), "layers": len(kept)}) or ModelLine(label="made", layers=len(kept))
    files = {str(name): _read(File, file) for name, file in _mapping(lineage.get("files")).items()}
    difference = lineage.get("max_logit_difference")
    return Facts(
        base=base,
        kept=tuple(layer for layer in kept if isinstance(layer, int)),
        models=[dense, made.model_copy(update={"metrics": columns})],
        steps=_read_all(Step, lineage.get("steps")),
        made_by=str(lineage.get("made_by", "")),
        versions=_texts(lineage.get("versions")),
        patched=tuple(map(str, _mapping(lineage.get("patched")))),
        files={name: file for name, file in files.items() if file is not None and name != PAGE},
        difference=difference if isinstance(difference, float) else None,
        quantisation=str(lineage.get("quantisation") or ""),
    )


def facts_of_run(record: Mapping[str, Any]) -> Facts | None:
    """What the record of a run says; None where it is of another form."""
    base = _read(Base, record.get("base"))
    models = _read_all(ModelLine, record.get("models"))
    if base is None or not models:
        return None
    return Facts(
        base=base,
        kept=tuple(record["kept"]),
        models=models,
        steps=_read_all(Step, record["steps"]),
        made_by=record["made_by"],
        versions=_texts(record["versions"]),
        patched=tuple(record["patched"]),
        recipe=record["recipe"],
        recipe_name=record["recipe_name"],
        overrides=tuple(record["overrides"]),
        limits=_read_all(Limit, record["limits"]),
        failure=record["failure"],
        ended_at=record["ended_at"],
        seconds=record["seconds"],
        machine=_texts(record["machine"]),
    )


def _name_column(metric: Metric) -> str:
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.name}{f' on {metric.place}' if metric.place else ''}{unit}"


def show_metric(metric: Metric) -> str:
    """The value, its unit and its standard error."""
    unit = f" {metric.unit}" if metric.unit else ""
    stderr = "" if metric.stderr is None else f" ± {metric.stderr:.2g}"
    return f"{show_number(metric.value)}{stderr}{unit}"
