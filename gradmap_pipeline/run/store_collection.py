"""Remove from a store what is old, beyond a size, not needed any more or named; never what a run uses."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import CommandError
from .store_entries import Entry, find_needed, list_entries
from .store_files import read_object
from .store_uses import guarded, read_uses, settle_killed_runs

_HOURS = {"h": 1, "d": 24, "w": 24 * 7}
_COLLECTED = ("step", "unit", "record")
_SHORTEST_KEY = 4
"""Digits of a key, or of the number of a run, that name one."""


@dataclass(frozen=True)
class Criteria:
    """What may go: what meets all that are given."""

    older_than: float | None = None
    """Seconds since the last use."""
    max_bytes: int | None = None
    """Of the whole store: what was used longest ago goes first, until it fits."""
    unused_by: Path | None = None
    """A folder: what the latest runs of the recipes in it used stays."""


@dataclass(frozen=True)
class Collection:
    """What was removed, or would be."""

    removed: list[Entry]
    left: list[Entry]
    """Meant to go, and used by a run under way."""
    kept_bytes: int
    """Of the whole store, afterwards."""


def parse_age(text: str) -> float:
    """Seconds in `12h`, `30d` or `2w`. Raises `ValueError`."""
    match = re.fullmatch(r"([0-9]{1,6})([hdw])", text)
    if match is None:
        raise ValueError(f"found {text[:40]!r}, accepted: a number of hours, days or weeks, as 12h, 30d or 2w")
    return int(match[1]) * _HOURS[match[2]] * 3600.0


def collect(root: Path, criteria: Criteria, *, is_dry: bool) -> Collection:
    """Remove what meets the criteria; `is_dry`: only say what. Raises `CommandError` where no recipe of a folder has run."""
    entries = list_entries(root)
    now = time.time()
    wanted = [entry for entry in entries if entry.sort in _COLLECTED]
    if criteria.older_than is not None:
        wanted = [entry for entry in wanted if now - entry.used_at > criteria.older_than]
    if criteria.unused_by is not None:
        steps, stages, recipes = find_needed(read_uses(root), criteria.unused_by)
        if not recipes:
            raise CommandError(
                f"--unused-by {str(criteria.unused_by)!r}: no recipe in it has run with this store, so everything would go; run "
                "them first, or name another folder"
            )
        wanted = [entry for entry in wanted if _is_unneeded(entry, steps, stages)]
    if criteria.max_bytes is not None:
        wanted = _until_it_fits(entries, wanted, criteria.max_bytes)
    return remove(root, wanted, is_dry=is_dry)


def _is_unneeded(entry: Entry, steps: set[str], stages: set[str]) -> bool:
    """Units may go where no needed recipe has a step of their stage; records say nothing of what is needed, and stay."""
    return entry.path.name not in steps if entry.sort == "step" else entry.sort == "unit" and entry.name not in stages


def _until_it_fits(entries: Sequence[Entry], wanted: Iterable[Entry], most: int) -> list[Entry]:
    size = sum(entry.bytes for entry in entries)
    chosen = []
    for entry in sorted(wanted, key=lambda entry: entry.used_at):
        if size <= most:
            break
        chosen.append(entry)
        size -= entry.bytes
    return chosen


def choose_named(root: Path, steps: Sequence[str], keys: Sequence[str], runs: Sequence[str]) -> list[Entry]:
    """What is named: all of a stage, results by the beginning of a key, runs by recipe or by the beginning of a number.

    Of a recipe, what no other recipe used, and nothing of its records; of a number, the record. Raises `CommandError` for a name
    that nothing has.
    """
    entries = list_entries(root)
    chosen: dict[Path, Entry] = {}
    for option, names, find in (("--step", steps, _find_stage), ("--key", keys, _find_key), ("--run", runs, _find_run)):
        for name in names:
            matching = find(entries, name)
            if not matching:
                raise CommandError(f"{option} {name!r}: the store {str(root)!r} has nothing of this name; see gradmap store ls")
            chosen |= {entry.path: entry for entry in matching}
    return list(chosen.values())


def _find_stage(entries: Sequence[Entry], name: str) -> list[Entry]:
    of_stage = [entry for entry in entries if entry.sort in ("step", "unit") and entry.name == name]
    return of_stage or [entry for entry in entries if entry.sort == "step" and _read_step(entry) == name]


def _read_step(entry: Entry) -> str | None:
    """The id that a step had in the recipe of the run that made it."""
    return read_object(entry.path / "outputs.json").get("step")


def _find_key(entries: Sequence[Entry], key: str) -> list[Entry]:
    _check_length("--key", key)
    return [entry for entry in entries if entry.sort in ("step", "unit") and entry.key.startswith(key.lower())]


def _find_run(entries: Sequence[Entry], name: str) -> list[Entry]:
    recipe = str(Path(name).resolve())
    if any(recipe in entry.recipes for entry in entries):
        return [entry for entry in entries if entry.recipes == (recipe,)]
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return []
    _check_length("--run", name)
    return [entry for entry in entries if entry.sort == "record" and Path(entry.name).stem.rpartition("-")[2].startswith(name)]


def _check_length(option: str, text: str) -> None:
    if len(text) < _SHORTEST_KEY:
        raise CommandError(f"{option}: found {text!r}; accepted: {_SHORTEST_KEY} digits or more of what gradmap store ls shows")


def remove(root: Path, entries: Sequence[Entry], *, is_dry: bool) -> Collection:
    """Remove entries, but not what a run under way uses.

    They are moved away at once, while no run can say that it begins to use one, and deleted afterwards.
    """
    from ..machine.atomic_folder import atomic_folder

    removed: list[Entry] = []
    left: list[Entry] = []
    with ExitStack() as stack:
        bin_folder = None if is_dry else stack.enter_context(atomic_folder(root / "removed"))
        with guarded(root):
            settle_killed_runs(root)
            is_used = _find_used(root)
            for number, entry in enumerate(entries):
                with ExitStack() as locks:
                    if is_used(entry) or not _lock(entry, locks):
                        left.append(entry)
                        continue
                    removed.append(entry)
                    if bin_folder is not None:
                        _move(entry, bin_folder / str(number))
    kept = sum(entry.bytes for entry in list_entries(root))
    return Collection(removed, left, kept - (sum(entry.bytes for entry in removed) if is_dry else 0))


def _move(entry: Entry, folder: Path) -> None:
    folder.mkdir()
    for path in entry.paths:
        with suppress(FileNotFoundError):  # a run has finished with it meanwhile
            path.rename(folder / path.name)


def _find_used(root: Path) -> Callable[[Entry], bool]:
    """Tells what runs under way use: their results, and the units of all their stages."""
    running = [use for use in read_uses(root) if use.is_running]
    steps = {step for use in running for step in use.steps}
    stages = {stage for use in running for stage in use.stages}
    return lambda entry: entry.path.name in steps if entry.sort == "step" else entry.sort == "unit" and entry.name in stages


def _lock(entry: Entry, locks: ExitStack) -> bool:
    """Whether no process holds the lock of a unit under way, or of a run; it is held until the entry is away."""
    from filelock import FileLock, Timeout

    for path in entry.paths:
        if path.suffix == ".lock":
            try:
                locks.enter_context(FileLock(path, blocking=False))
            except (Timeout, OSError):
                return False
    return True
