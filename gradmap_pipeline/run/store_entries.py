"""What a store holds, by names, sizes and times alone: nothing is read but which recipes used it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .store_uses import Use, read_uses

Sort = Literal["step", "unit", "record", "environment", "other"]
_NAMED = re.compile(r"(?P<name>.+)-(?P<key>[0-9a-f]{16,64})")
_PARTS = {"steps", "units", "runs", "environments"}
_UNIT_FILES = (".json", ".safetensors", ".lock", "")
"""Endings of what a unit consists of: its value, its tensors, and the folder of one under way with its lock."""


@dataclass(frozen=True)
class Entry:
    """One thing that a store keeps: a finished step, a finished unit of work, the record of a run, an environment, or else."""

    sort: Sort
    name: str
    """Of the stage; of a record or anything else, that of its file."""
    key: str
    """The beginning of the key of a step, or the digest of that of a unit; empty of anything else."""
    path: Path
    """Of its folder or file; of a unit, without ending."""
    bytes: int
    used_at: float
    """Seconds since 1970 when a run made it, or last took it."""
    recipes: tuple[str, ...] = ()
    """Files of the recipes whose latest runs used it."""

    @property
    def paths(self) -> list[Path]:
        """All that belongs to it."""
        paths = [self.path.with_name(self.path.name + ending) for ending in _UNIT_FILES] if self.sort == "unit" else [self.path]
        if self.sort == "record":
            paths.append(self.path.with_suffix(".lock"))
        return [path for path in paths if os.path.lexists(path)]


def list_entries(root: Path) -> list[Entry]:
    """All that a store keeps, what was used last first."""
    recipes: dict[str, list[str]] = {}
    for use in read_uses(root):
        for step in use.steps:
            if use.recipe not in recipes.setdefault(step, []):
                recipes[step].append(use.recipe)
    entries = [*_list_steps(root, recipes), *_list_units(root), *_list_others(root)]
    return sorted(entries, key=lambda entry: (-entry.used_at, entry.name, entry.key))


def _list_steps(root: Path, recipes: dict[str, list[str]]) -> Iterator[Entry]:
    for item in _scan(root / "steps"):
        named = _NAMED.fullmatch(item.name)
        if named and item.is_dir(follow_symlinks=False):
            size, _ = _measure(item)
            used = item.stat(follow_symlinks=False).st_mtime
            yield Entry("step", named["name"], named["key"], Path(item.path), size, used, tuple(recipes.get(item.name, ())))


def _list_units(root: Path) -> Iterator[Entry]:
    parts: dict[str, list[tuple[int, float]]] = {}
    for item in _scan(root / "units"):
        stem = item.name
        for ending in filter(None, _UNIT_FILES):
            stem = stem.removesuffix(ending)
        if _NAMED.fullmatch(stem):
            parts.setdefault(stem, []).append(_measure(item))
    for stem, measured in parts.items():
        name, _, key = stem.rpartition("-")
        sizes, times = zip(*measured, strict=True)
        yield Entry("unit", name, key, root / "units" / stem, sum(sizes), max(times))


def _list_others(root: Path) -> Iterator[Entry]:
    for item in _scan(root / "runs"):
        if not item.name.endswith(".lock"):
            size, used = _measure(item)
            yield Entry("record", item.name, "", Path(item.path), size, used)
    for item in _scan(root / "environments"):
        if not item.name.startswith("."):
            size, used = _measure(item)
            yield Entry("environment", item.name, "", Path(item.path), size, used)
    for item in _scan(root):
        if item.name not in _PARTS:
            size, used = _measure(item)
            yield Entry("other", item.name, "", Path(item.path), size, used)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _measure(item: os.DirEntry[str]) -> tuple[int, float]:
    """Bytes of a file, or of all files in a folder, and the latest time at which one of these changed. Links are not followed."""
    try:
        status = item.stat(follow_symlinks=False)
    except FileNotFoundError:  # a run has finished with it meanwhile
        return 0, 0.0
    size, latest = (0 if item.is_dir(follow_symlinks=False) else status.st_size), status.st_mtime
    if item.is_dir(follow_symlinks=False):
        for inside in _scan(Path(item.path)):
            more, changed = _measure(inside)
            size, latest = size + more, max(latest, changed)
    return size, latest


@dataclass(frozen=True)
class Total:
    """What entries of one sort and name take together."""

    sort: Sort
    name: str
    """Empty for sorts that are not told apart by names."""
    count: int
    bytes: int
    used_at: float


def add_up(entries: Iterable[Entry]) -> list[Total]:
    """Steps and units by stage, records, environments and the rest each together; the largest first."""
    groups: dict[tuple[Sort, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.sort, entry.name if entry.sort in ("step", "unit") else ""), []).append(entry)
    totals = [
        Total(sort, name, len(group), sum(one.bytes for one in group), max(one.used_at for one in group))
        for (sort, name), group in groups.items()
    ]
    return sorted(totals, key=lambda total: (-total.bytes, total.sort, total.name))


def find_needed(uses: Iterable[Use], folder: Path) -> tuple[set[str], set[str], list[str]]:
    """What the latest runs of the recipes in a folder used: names of step folders, stages, and the recipes that are still there."""
    place = folder.resolve()
    steps: set[str] = set()
    stages: set[str] = set()
    recipes: list[str] = []
    for use in uses:
        if Path(use.recipe).is_relative_to(place) and Path(use.recipe).is_file():
            steps.update(use.steps)
            stages.update(use.stages)
            recipes.append(use.recipe)
    return steps, stages, recipes
