"""Errors on their way from one process of a run to the others, as JSON: of the same class, with the same message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import CapacityError, GradmapError, StageError, name_error
from .shortages import find_shortage


def describe_error(error: BaseException) -> dict[str, Any]:
    """What `rebuild_error` makes the error of again in another process."""
    shortage = None if isinstance(error, GradmapError) else find_shortage(error)
    return {
        "type": type(error).__name__ if shortage is None else CapacityError.__name__,
        "message": name_error(error) if shortage is None else shortage.explain(),
        **{name: getattr(error, name, None) for name in ("where", "option")},
    }


def rebuild_error(told: dict[str, Any]) -> GradmapError:
    """The error that another process has met; a `StageError` where it is none of ours."""
    classes = {cls.__name__: cls for cls in _with_subclasses(GradmapError)}
    cls = classes.get(told["type"], StageError)
    error = cls.__new__(cls)
    Exception.__init__(error, told["message"])
    error.where = told["where"]
    if told["option"] is not None:
        error.option = told["option"]  # type: ignore[attr-defined]
    return error


def _with_subclasses(cls: type[GradmapError]) -> Iterator[type[GradmapError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _with_subclasses(below)
