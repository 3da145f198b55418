"""For the tests of plugin authors: run one stage alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .artifacts import Artifact
from .errors import PluginError
from .memory import default_budget
from .stage import Advance, Context, Stage


def make_context(
    folder: Path, *, seed: int = 0, dtype: str = "float32", memory: int | None = None, notes: list[str] | None = None
) -> Context:
    """A context on the CPU that keeps nothing and appends what the stage tells the user to `notes`.

    `memory`: bytes the process may have resident; None: 80 % of what is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[str] = [] if notes is None else notes
    memory = default_budget() if memory is None else memory
    return Context(folder, seed, "cpu", dtype, memory, _silent_progress, found.append, _remember_nothing)


def run_stage(stage: Stage, folder: Path, *, seed: int = 0, dtype: str = "float32", **inputs: Artifact) -> Any:
    """Run a stage in `folder` and return its outputs, after checking that they survive being stored.

    Raises `PluginError` when the outputs are of another type, or change on the way through JSON.
    """
    result = stage.run(type(stage).Inputs.model_validate(inputs), make_context(folder, seed=seed, dtype=dtype))
    if not isinstance(result, stage.Outputs):
        raise PluginError(f"stage {stage.name!r} must return its Outputs, got {type(result).__name__}")
    again: BaseModel = type(result).model_validate_json(result.model_dump_json())
    if again != result:
        raise PluginError(f"outputs of stage {stage.name!r} change when they are stored: {result!r} became {again!r}")
    return result


@contextmanager
def _silent_progress(description: str, total: int, unit: str) -> Iterator[Advance]:
    def advance(units: int = 1, /) -> None:
        pass

    yield advance


def _remember_nothing(key: Any, compute: Callable[[], Any]) -> Any:
    return compute()
