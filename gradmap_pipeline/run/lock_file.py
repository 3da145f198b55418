"""`RECIPE.lock`: all that decides the bytes of what a recipe comes to, written once and compared before each locked run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..checkpoint.graph import ModelGraph, open_model
from ..errors import CommandError, Problem, RecipeError
from ..machine.atomic_folder import atomic_folder, write_file
from ..machine.input_files import read_input
from ..machine.machine import Machine
from ..machine.shortages import is_shortage
from ..recipe.plan import Plan
from .provenance import describe_run, explain_processor, find_differences
from .revisions import Revision, find_revisions, pin_revisions
from .store import Store

_ENDING = ".lock"
_MAX_BYTES = 16 << 20


class LockedStep(BaseModel):
    """What decides the bytes of one step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    stage: str
    plugin: str
    code: str
    inputs: dict[str, str]
    options: dict[str, Any]
    python: dict[str, Any] | None = None


class Lock(BaseModel):
    """What a lock file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    """Of the form of the file."""
    made_by: str
    python: str
    libraries: dict[str, str]
    model: dict[str, str | None]
    seed: int
    device: str
    dtype: str
    threads: int
    processor: str
    revisions: list[Revision]
    steps: list[LockedStep]

    def describe(self) -> dict[str, Any]:
        """What decides the bytes, as `describe_run` gives it."""
        steps = [step.model_dump(mode="json", exclude=None if step.python else {"python"}) for step in self.steps]
        return {**self.model_dump(mode="json", exclude={"version", "revisions"}), "steps": steps}


def name_lock(recipe: Path) -> Path:
    """The lock file of a recipe, beside it."""
    return recipe.with_name(recipe.name + _ENDING)


def make_lock(plan: Plan, machine: Machine, store: Store) -> Lock:
    """Look at everything that a run of the plan would use. The model is downloaded if it must be; no step runs."""
    base = open_model(plan.model, store.digest_of)
    revisions = find_revisions(plan, base)
    described = describe_run(pin_revisions(plan, revisions), machine, base, store)
    return Lock.model_validate({"version": 1, "revisions": revisions, **json.loads(json.dumps(described))})


def write_lock(file: Path, lock: Lock) -> None:
    """Write a lock file in the place of an earlier one. Raises `CommandError` where it cannot be, or something else is there."""
    if file.exists():
        read_lock(file, "is in the way")
    text = json.dumps(lock.model_dump(mode="json", exclude_none=False), indent=2, ensure_ascii=False) + "\n"
    try:
        with atomic_folder(file.absolute()) as draft:
            write_file(file, text, draft)
    except OSError as error:
        if is_shortage(error):
            raise
        raise CommandError(f"{str(file)!r} cannot be written: {error.strerror or error}; make its folder writable") from error


def read_lock(file: Path, wrong: str = "cannot be used") -> Lock:
    """A lock file. Raises `CommandError` where there is none, or it is of another form. `wrong`: what is then said of it."""
    recipe = file.with_name(file.name.removesuffix(_ENDING))
    try:
        content = read_input(file, _MAX_BYTES)
    except FileNotFoundError:
        raise CommandError(f"there is no {str(file)!r}; write it with `gradmap lock {recipe}`") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{str(file)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return Lock.model_validate(json.loads(content.decode("utf-8")))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"])) or "the whole"
        said = f"{str(file)!r} {wrong}: it is no lock file of this version ({place}: {detail['msg'].lower()})"
    except (ValueError, RecursionError):
        said = f"{str(file)!r} {wrong}: it is no lock file, as it is not JSON"
    raise CommandError(f"{said}; move it away and write it anew with `gradmap lock {recipe}`")


def apply_lock(plan: Plan, machine: Machine, lock: Lock) -> tuple[Plan, Machine]:
    """The plan at the commits of the lock, and the machine with its threads, where the command line says nothing of them."""
    threads = lock.threads if machine.threads is None else machine.threads
    return pin_revisions(plan, lock.revisions), replace(machine, threads=threads)


def check_lock(plan: Plan, machine: Machine, store: Store, locked: dict[str, Any], where: str) -> tuple[list[str], str | None]:
    """What is another than what is locked, a sentence each; and what to say of another processor.

    `where`: the lock, for the sentences.
    """
    base: ModelGraph = open_model(plan.model, store.digest_of)
    now = json.loads(json.dumps(describe_run(plan, machine, base, store)))
    return [f"{where}: {line}" for line in find_differences(locked, now)], explain_processor(locked, now)


def refuse(differences: list[str], where: str, advice: str) -> None:
    """Raise `RecipeError` with all that differs, where anything does."""
    if differences:
        lines = [line.removeprefix(f"{where}: ") for line in differences]
        raise RecipeError([Problem(where, line) for line in (*lines, f"nothing was run; {advice}")])
