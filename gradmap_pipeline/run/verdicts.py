"""The store keeps that the stages of a recipe can work on its model, once that is seen, so that `gradmap check` need not look.

Of a model that other recipes use, or this one before it was edited, it keeps what their stages asked of its structure.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..errors import StageError
from ..machine.digests import sha256_of_value
from ..recipe.plan import Plan, PlannedStep
from ..recipe.stage_code import StageCode
from .inspection import inspect_plan
from .keys import version_of
from .store import Store

_NAME = "check"
"""Under which the store keeps verdicts."""
_ANSWERS = "structure"
"""Under which it keeps what was asked of a model."""
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
_SHIPPED = ("gradmap_pipeline", "gradmap_plugins")


def inspect_once(plan: Plan, store: Store) -> None:
    """`inspect_plan`, unless nothing of what it looks at has changed since all was well. What is refused is looked at each time.

    Where the store cannot be written, nothing is kept; nor where something was left out because memory was short.
    """
    folder = plan.model.find_folder()
    if folder is None:
        return
    structure = _make_structure_key(plan, folder)
    key = _make_key(plan, structure)
    if store.load_unit(_NAME, key) is not None:
        return
    started = time.monotonic()
    answers = _load_answers(store, structure)
    is_complete, known = False, len(answers)
    try:
        is_complete = inspect_plan(plan, answers)
    finally:
        now = _make_structure_key(plan, folder)
        units: dict[tuple[str, str], Any] = {}
        if now == structure and len(answers) > known:  # else something has changed meanwhile
            units[_ANSWERS, structure] = _load_answers(store, structure) | answers  # of another check, too
        if is_complete and _make_key(plan, now) == key:
            units[_NAME, key] = "well"
        _keep(units, store, time.monotonic() - started)


def describe_seen(plan: Plan) -> str | None:
    """A digest of all that stages look at before a run, but what the run writes. None where the model is not on this machine."""
    folder = plan.model.find_folder()
    return None if folder is None else _make_key(plan, _make_structure_key(plan, folder), is_written=False)


def keep_seen(plan: Plan, store: Store, seen: str | None, answers: dict[str, Any]) -> None:
    """Keep that the stages of all steps have looked and a run has ended well, if all is as `describe_seen` had it before.

    What the run has written counts in what is kept. `answers`: what was seen of the model's structure.
    """
    folder = plan.model.find_folder()
    structure = None if folder is None else _make_structure_key(plan, folder)
    if structure is not None and _make_key(plan, structure, is_written=False) == seen:
        answers = _load_answers(store, structure) | answers
        _keep({(_ANSWERS, structure): answers, (_NAME, _make_key(plan, structure)): "well"}, store, 0.0)


def _load_answers(store: Store, key: str) -> dict[str, Any]:
    kept = store.load_unit(_ANSWERS, key)
    return {} if kept is None else dict(kept["value"])


def _keep(units: dict[tuple[str, str], Any], store: Store, seconds: float) -> None:
    if not units:
        return
    with suppress(OSError, StageError):  # what cannot be kept hides no refusal
        store.prepare()
        try:
            for (name, key), value in units.items():
                kept = store.load_unit(name, key)
                if kept is None or kept["value"] != value:  # what is known is not written again
                    store.save_unit(name, key, value, seconds)
        finally:
            store.close()


def _make_structure_key(plan: Plan, model: Path) -> str:
    """All that the structure of a model depends on. Files count by their state, which the system changes with them."""
    return sha256_of_value(
        {
            "model": [plan.model.model_dump(mode="json"), _list_states(model)],
            "code": [_list_states(_find_package(name)) for name in _SHIPPED],
            "plugins": sorted(step.code.digest for step in plan.steps if not StageCode.is_shipped(type(step.stage))),
            "versions": {library: version_of(library) for library in _LIBRARIES},
            "packages": [_list_state(Path(place)) for place in sys.path if Path(place).name.endswith("-packages")],
            "system": [platform.python_version(), platform.platform(), os.cpu_count(), os.environ.get("PATH")],
        }
    )


def _make_key(plan: Plan, structure: str, *, is_written: bool = True) -> str:
    """All that the answers of stages depend on. `is_written`: what is where exports go counts, too."""
    steps = [
        {
            "id": step.id,
            "stage": step.stage.name,
            "code": None if StageCode.is_shipped(type(step.stage)) else step.code.digest,
            "options": step.stage.model_dump(mode="json"),
            "files": [_list_states(path) for path in _find_files(step, is_written)],
            "inputs": {name: ".".join(source) for name, source in step.inputs.items()},
            "environment": None if step.environment is None else [repr(step.environment), str(step.python)],
            "versions": {library: version_of(library) for library in step.stage.libraries},
        }
        for step in plan.steps
    ]
    return sha256_of_value({"structure": structure, "steps": steps})


def _find_package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _find_files(step: PlannedStep, is_written: bool) -> list[Path]:
    written = {path.resolve() for path in step.writes}
    named = *_find_paths(step.stage), *step.writes
    return [path for path in named if is_written or path.resolve() not in written]


def _find_paths(value: Any) -> Iterator[Path]:
    """Files and folders that options name, at any depth."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for _, item in value:
            yield from _find_paths(item)
    elif isinstance(value, dict):
        yield from _find_paths(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _find_paths(item)


def _list_states(path: Path) -> list[list[Any]]:
    """Of a file, or of each file of a folder, without those that Python makes of code. A Python counts with its packages."""
    if path.is_dir():
        return [_list_state(each) for each in sorted(path.rglob("*")) if each.is_file() and each.suffix != ".pyc"]
    packages = path.parent.parent.glob("lib/python*/site-packages") if os.access(path, os.X_OK) else ()
    return [_list_state(each) for each in (path, *packages)]


def _list_state(path: Path) -> list[Any]:
    """Where it is, its size, and times of its latest changes; none of these where it is not there."""
    try:
        status = path.stat()
    except OSError:
        return [str(path.absolute())]
    return [str(path.absolute()), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
