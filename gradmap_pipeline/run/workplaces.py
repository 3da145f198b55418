"""The other Pythons that steps run in."""

from __future__ import annotations

from ..errors import GradmapError
from ..machine.environment import Workplace
from ..recipe.plan import PlannedStep
from .events import Reporter
from .store import Store


def workplace_of(step: PlannedStep, store: Store) -> Workplace | None:
    """The other Python that a step runs in, if it does."""
    return None if step.environment is None else Workplace(step.environment, store.environments, step.python)


def prepare_workplace(workplace: Workplace, step: PlannedStep, reporter: Reporter) -> None:
    """Make an environment unless it is there. Raises `StageError`, with the step."""
    try:
        workplace.prepare(lambda text: reporter.note(step.id, text))
    except GradmapError as error:
        error.where = f"step {step.id!r}"
        raise
