"""Which results runs use: each is told before it is read, so that none is removed under a run, and it is known what for.

In the store, `uses/running-<number>.jsonl` is of a run under way, whose process holds a lock on the file beside it;
`uses/<recipe>-<digest of its path>.json` is of the latest run of each recipe. Both sides hold the guard for a moment: a run while
it tells, a collection while it looks and moves things away. What a collection is first at, a run does not find, and makes again.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..machine.digests import sha256_of_value
from .store_files import read_object, with_digest

FOLDER = "uses"
_RUNNING = "running-"
_SHORT = 16


@dataclass(frozen=True)
class Use:
    """What the latest run of a recipe used, or what one under way uses so far."""

    recipe: str
    """Absolute path of its file."""
    stages: tuple[str, ...]
    """Of all its steps."""
    steps: tuple[str, ...]
    """Names of folders in `steps`."""
    is_running: bool = False
    at: float = 0.0
    """Seconds since 1970 when it ended, or began."""


class RunningUses:
    """The uses of this process's run, while it goes on. Before `start` and after `close`, nothing is told."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._steps: set[str] = set()
        self._file: Path | None = None
        self._lock: Any = None

    def start(self, recipe: Path, stages: Sequence[str]) -> None:
        """Say that a run of these stages goes on, until `close`."""
        from filelock import FileLock

        with guarded(self._root):
            file = self._root / FOLDER / f"{_RUNNING}{secrets.token_hex(4)}.jsonl"
            lock = FileLock(file.with_suffix(".lock"), blocking=False)
            lock.acquire()
            self._file, self._lock, self._steps = file, lock, set()
            self._append({"recipe": str(recipe.resolve()), "stages": list(dict.fromkeys(stages)), "at": time.time()})

    def note(self, paths: Iterable[Path]) -> None:
        """Say, before it reads them, that the run uses these folders of steps, or files in them; others do not count."""
        if self._file is None:
            return
        steps = self._root / "steps"
        names = {path.relative_to(steps).parts[0] for path in paths if path.is_relative_to(steps)} - self._steps
        if not names:
            return
        with suppress(FileNotFoundError), guarded(self._root):  # somebody has deleted the store; the step says so
            for name in sorted(names):
                self._append({"step": name})
        self._steps |= names
        for name in names:
            touch(steps / name)

    def close(self, *, is_complete: bool) -> None:
        """Keep what was used as that of the latest run of the recipe; of one that was stopped, beside what the run before used."""
        if self._file is None:
            return
        with suppress(OSError), guarded(self._root):
            _settle(self._root, _read_running(self._file), is_complete=is_complete)
            _drop(self._file)
        self._lock.release()
        self._file = None

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def guarded(root: Path) -> Iterator[None]:
    """No other process tells or removes anything in this store meanwhile. For moments."""
    from filelock import FileLock

    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "guard.lock"):
        yield


def touch(path: Path) -> None:
    """Note that something of the store is used now."""
    with suppress(OSError):
        os.utime(path)


def read_uses(root: Path) -> list[Use]:
    """The uses that a store knows, those of runs under way among them. Looks at no lock: a killed run counts as running."""
    uses = []
    for file in sorted((root / FOLDER).glob("*.json*")):
        use = _read_running(file) if file.name.startswith(_RUNNING) else _read_latest(file)
        if use is not None:
            uses.append(use)
    return uses


def settle_killed_runs(root: Path) -> None:
    """Keep what killed runs used as that of the latest runs of their recipes. Call it within `guarded`."""
    from filelock import FileLock, Timeout

    for file in (root / FOLDER).glob(f"{_RUNNING}*.jsonl"):
        lock = FileLock(file.with_suffix(".lock"), blocking=False)
        try:
            lock.acquire()
        except (Timeout, OSError):  # its process runs, or belongs to another user
            continue
        with suppress(OSError):  # a full disk must not keep a collection from making room
            _settle(root, _read_running(file), is_complete=False)
        _drop(file)
        lock.release()


def _settle(root: Path, use: Use | None, *, is_complete: bool) -> None:
    if use is None:
        return
    recipe = Path(use.recipe)
    file = root / FOLDER / f"{recipe.stem[:64]}-{sha256_of_value(use.recipe)[:_SHORT]}.json"
    before = None if is_complete else _read_latest(file)
    steps, stages = dict.fromkeys(use.steps), dict.fromkeys(use.stages)
    if before is not None:
        steps |= dict.fromkeys(before.steps)
        stages |= dict.fromkeys(before.stages)
    content = {"recipe": use.recipe, "stages": list(stages), "steps": list(steps), "at": time.time()}
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    draft.write_text(json.dumps(with_digest(content)), encoding="utf-8")
    draft.replace(file)


def _drop(file: Path) -> None:
    for path in (file, file.with_suffix(".lock")):
        with suppress(OSError):
            path.unlink()


def _read_latest(file: Path) -> Use | None:
    content = read_object(file)
    try:
        return Use(content["recipe"], tuple(content["stages"]), tuple(content["steps"]), at=content["at"])
    except (KeyError, TypeError):
        return None


def _read_running(file: Path) -> Use | None:
    """A last line that a killed process left half-written counts as not there: nothing of it had been read."""
    try:
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        head = json.loads(first)
        steps = []
        for line in lines:
            with suppress(ValueError, KeyError):
                steps.append(json.loads(line)["step"])
        return Use(head["recipe"], tuple(head["stages"]), tuple(steps), True, head["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
