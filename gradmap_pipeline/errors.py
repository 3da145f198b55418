"""Every error a user can meet. The command line prints their message, without a traceback, and exits with their code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .interruptions import is_interruption

_LONGEST = 100
"""Characters of a value in a message."""


class GradmapError(Exception):
    """Base of all errors caused by a recipe, a plugin, a model or a machine; never by a bug here."""

    exit_code = 4
    where: str | None = None
    """Place the message speaks of: `file:line:column`, a step, a folder."""
    is_agreed = False
    """Whether all processes of a run raise it."""
    is_told_elsewhere = False
    """Whether the leading process of the run tells it."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe."""

    where: str
    """`file:line:column`, or the command-line option that brought it in."""
    message: str
    order: tuple[int, int, int] = field(default=(0, 0, 0), compare=False)
    """Where it is listed among others: the file's by line and column, then those of the command line."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class RecipeError(GradmapError):
    """The recipe cannot be planned. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.where = problems[0].where
        super().__init__("\n".join(map(str, problems)))


class OptionError(GradmapError):
    """A stage cannot work with the value of one of its options. The plan adds the place in the recipe."""

    exit_code = 2

    def __init__(self, option: str, message: str) -> None:
        self.option = option
        super().__init__(message)


class NotKnownError(GradmapError):
    """A stage needs a value that the plan does not know yet. What was asked of it is then not known."""


class CommandError(GradmapError):
    """An option of the command line cannot be used."""

    exit_code = 2


class LaunchError(GradmapError):
    """The processes of a run were not started as they should be, or do not find each other."""

    exit_code = 4


class PluginError(GradmapError):
    """A plugin breaks the stage contract."""

    exit_code = 2


class ModelError(GradmapError):
    """A model is not there, or is not one that can be pruned."""

    exit_code = 2


class CapacityError(GradmapError):
    """The machine has too little memory or disk for the plan."""

    exit_code = 3
    enough: int | None = None
    """Bytes to allow with --memory that suffice as far as is known; None where more memory does not help."""
    by_option: Mapping[str, str] = MappingProxyType({})
    """What helps besides, where the stage that runs has an option of this name."""


class StageError(GradmapError):
    """A stage failed while running."""

    exit_code = 4


class QualityError(GradmapError):
    """A limit that the recipe sets on quality is not met."""

    exit_code = 5


class DifferenceError(GradmapError):
    """What was computed again differs from what it was."""

    exit_code = 6


class Interruption(GradmapError):  # noqa: N818 - nothing went wrong
    """A process of this run was ended from outside."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """The first line of what an error says, and the next where the first only announces it."""
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()] or [""]
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def on_one_line(error: BaseException) -> str:
    """The message of an error, its lines joined by semicolons."""
    return "; ".join(line.strip() for line in text_of(error).splitlines() if line.strip())


def text_of(error: BaseException) -> str:
    """The message of an error, also of one that fails when it is asked."""
    try:
        return str(error)
    except BaseException as failure:
        if is_interruption(failure):
            raise
        return f"its message is not known, as __str__ fails with {type(failure).__name__}"


def name_error(error: BaseException) -> str:
    """Its message, after its type where it is none of ours."""
    return text_of(error) if isinstance(error, GradmapError) else f"{type(error).__name__}: {text_of(error)}"


def describe_value(value: object) -> str:
    """A value that a plugin gave where another was wanted: as it is where that is short and plain, else its type."""
    cls = type(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or cls in (bool, int, float, complex, str, bytes, list, tuple, set, dict):
        try:
            text = repr(value)
        except Exception:  # of what it holds
            text = ""
        if 0 < len(text) <= _LONGEST:
            return text
    return add_article(cls.__name__)


def add_article(name: str) -> str:
    """The name of a class with `a` or `an` before it."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
