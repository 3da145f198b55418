"""The forms in which recorded values are shown. What does not have the form of a view is not shown.

Values come from files, and from artifacts that plugins define.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import GradmapError
from ..metrics import Metric

_REPEATED_FROM = 0.5
"""Repetition from which an answer counts as one that repeats itself."""


_MOST_LAYERS = 10_000
Count = Annotated[int, Field(ge=0, le=10**18)]
Figure = Annotated[float, Field(ge=-1e100, le=1e100)]
"""Numbers that can be drawn and divided; anything beyond is no measurement."""
PositiveFigure = Annotated[float, Field(gt=0, le=1e100)]


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


class TrainingMoment(_View):
    """A point of a training curve; losses in nats a token."""

    step: Count
    loss: Figure | None = None
    held_out: Figure | None = None


class Training(_View):
    """How a model was trained as a whole."""

    before: Figure
    after: Figure
    best_step: Count
    steps: Count
    trained_parameters: Count
    curve: tuple[TrainingMoment, ...]


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
    agreement: Figure | None = None

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


class Rates(_View):
    """Tokens a second of each round."""

    prefill: Annotated[tuple[PositiveFigure, ...], Field(min_length=1)]
    decode: Annotated[tuple[PositiveFigure, ...], Field(min_length=1)]


class SpeedCase(_View):
    """One kind of work, of a model and of the one beside it."""

    sequences: Count
    prompt_tokens: Count
    new_tokens: Count
    rates: Rates
    reference: Rates | None = None


class Speed(_View):
    """How fast a model is on one machine."""

    label: str
    reference_label: str = ""
    program: str
    device: str
    device_name: str
    threads: Count
    dtype: str
    measured_at: str
    cases: tuple[SpeedCase, ...]


class File(_View):
    """A file of an export."""

    size: Count
    sha256: str


class Folder(_View):
    """An exported folder, as a step gives it."""

    folder: str
    files: dict[str, File]


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


Shown = TypeVar("Shown", bound=BaseModel)


def read(view: type[Shown], value: Any) -> Shown | None:
    """A recorded value in the form of a view; None where it has another."""
    try:
        return view.model_validate(value)
    except (ValidationError, GradmapError):
        return None


def read_all(view: type[Shown], values: Any) -> list[Shown]:
    """Those of a list of recorded values that have the form of a view."""
    shown = [read(view, value) for value in (values if isinstance(values, list | tuple) else [])]
    return [one for one in shown if one is not None]
