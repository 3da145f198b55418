"""What happens during a run, as values; and who listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..metrics import Metric
    from .limits import CheckedLimit
    from .summary import Summary


@dataclass(frozen=True)
class Place:
    """A model, and where a run computes with it."""

    model: str
    device: str
    """As torch names it."""
    dtype: str
    threads: int
    memory: int
    """Bytes that each process may have resident; on a GPU, there."""
    store: str
    processes: int = 1


@dataclass(frozen=True)
class RunStarted:
    recipe: str
    steps: list[str]


@dataclass(frozen=True)
class StepStarted:
    step: str
    stage: str


@dataclass(frozen=True)
class Progress:
    step: str
    description: str
    done: int
    total: int
    unit: str
    rate: float | None
    """Units a second, None before the first unit."""
    seconds_left: float | None
    detail: str = ""
    """A figure that changes as the work goes on, such as a loss."""


@dataclass(frozen=True)
class StepFinished:
    step: str
    stage: str
    cached: bool
    """Taken from the store."""
    seconds: float
    computed_seconds: float
    """What the result took when it was computed, in this run or before."""
    outputs: dict[str, Any]
    """Each artifact's JSON."""
    metrics: list[Metric] = field(default_factory=list)
    """Metrics that the outputs carry."""
    limits: list[CheckedLimit] = field(default_factory=list)
    """Limits that the recipe sets, kept or missed."""
    peak_bytes: int | None = None
    """The most memory that the process had held when the result was computed; None: not known."""
    key: str = ""
    """Of the result in the store."""
    folder: str = ""
    """Of the result in the store."""


@dataclass(frozen=True)
class RunFinished:
    seconds: float
    summary: Summary


class Reporter(Protocol):
    """Tells somebody, in some form."""

    @property
    def is_for_programs(self) -> bool:
        """Whether a program reads it, which counts on an end being told."""
        ...

    def run_started(self, event: RunStarted) -> None: ...
    def computing(self, event: Place) -> None: ...
    def step_started(self, event: StepStarted) -> None: ...
    def progress(self, event: Progress) -> None: ...
    def progress_ended(self, step: str, description: str) -> None: ...
    def note(self, step: str, text: str) -> None: ...
    def step_finished(self, event: StepFinished) -> None: ...
    def run_finished(self, event: RunFinished) -> None: ...
    def run_stopped(self, event: RunFinished) -> None: ...
    def error(self, exit_code: int, message: str, where: str | None) -> None: ...
