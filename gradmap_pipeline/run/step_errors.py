"""Errors of a step, told with its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import GradmapError, StageError, name_error
from ..interruptions import is_interruption
from ..recipe.plan import PlannedStep


@contextmanager
def naming_unforeseen(step: PlannedStep) -> Iterator[None]:
    """A step runs in this block; what its code raises that is no `Exception`, such as in an artifact's own checks, is an error."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or is_interruption(error):
            raise
        failure = StageError(f"stage {step.stage.name!r} ({step.plugin}) failed: {name_error(error)}")
        failure.where = f"step {step.id!r}"
        raise failure from error


@contextmanager
def naming(step: PlannedStep) -> Iterator[None]:
    """What goes wrong meanwhile is told with the step."""
    try:
        yield
    except GradmapError as error:
        error.where = error.where or f"step {step.id!r}"
        raise
