"""Records of runs as files of the store: one a run, newest first by name, found by the beginning of an id.

A file is one JSON object with its digest. Its first line holds the head, a few fields with a digest of their own, so that a
list of a thousand runs reads a thousand lines. Imports nothing that takes time.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..machine.digests import sha256_of_value
from ..text import dump_json
from .store_files import DIGEST, read_object, with_digest

FOLDER = "runs"
"""Of the records, in the store."""
RUNNING, KILLED, DONE, MISSED, FAILED, INTERRUPTED = "running", "killed", "done", "limit missed", "failed", "interrupted"
"""How a run stands, or has ended."""
_HEAD = "head"
_NAME = re.compile(r"(\d{8}T\d{12})Z-([0-9a-f]{12})\.json")
_TIME = "%Y%m%dT%H%M%S%f"
_SHORTEST = 6
"""Digits of an id that are shown, unless more are needed to tell it apart."""
_LATEST = re.compile(r"last(?:~(\d{1,6}))?")


@dataclass(frozen=True)
class RunFile:
    """The file of one run's record."""

    path: Path
    id: str
    """Twelve hexadecimal digits."""

    @property
    def lock(self) -> Path:
        """A file that the run's process holds a lock on until it ends."""
        return self.path.with_suffix(".lock")


def new_run_file(store: Path) -> RunFile:
    """A file, not yet there, for a run that starts now."""
    run_id = secrets.token_hex(6)
    started = datetime.now(timezone.utc).strftime(_TIME)
    return RunFile(store / FOLDER / f"{started}Z-{run_id}.json", run_id)


def list_runs(store: Path) -> list[RunFile]:
    """The records in a store, newest first; none where there is no store."""
    folder = store / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = [match for name in sorted(names, reverse=True) if (match := _NAME.fullmatch(name))]
    return [RunFile(folder / match[0], match[2]) for match in matches]


def shorten_ids(runs: Sequence[RunFile]) -> dict[str, str]:
    """By id, the shortest beginning that no other run has, of six digits at least."""
    ids = sorted(run.id for run in runs)
    short = {}
    for place, run_id in enumerate(ids):
        neighbours = [other for other in (ids[place - 1 : place] + ids[place + 1 : place + 2]) if other != run_id]
        length = next((n for n in range(_SHORTEST, len(run_id)) if all(run_id[:n] != o[:n] for o in neighbours)), len(run_id))
        short[run_id] = run_id[:length]
    return short


def is_run_name(text: str) -> bool:
    """Whether a text has the form of what `find_run` takes."""
    return bool(_LATEST.fullmatch(text) or re.fullmatch(r"[0-9a-f]{1,12}", text))


def find_run(store: Path, name: str) -> RunFile:
    """The run that a text names: the beginning of its id, `last`, or `last~2`, the second before it. Raises `CommandError`."""
    runs = list_runs(store)
    if not runs:
        raise CommandError(f"the store {str(store)!r} has no record of a run; run a recipe first, or name the store with --store")
    latest = _LATEST.fullmatch(name)
    if latest:
        back = int(latest[1] or 0)
        if back >= len(runs):
            raise CommandError(
                f"the store {str(store)!r} has records of {len(runs)} runs, so there is no {name!r}; see gradmap log"
            )
        return runs[back]
    if not is_run_name(name):
        advice = "give the beginning of an id, as gradmap log shows it, last, or last~1"
        raise CommandError(f"found {name!r} as the name of a run; {advice}")
    matches = [run for run in runs if run.id.startswith(name)]
    if not matches:
        raise CommandError(f"no run in {str(store)!r} has an id that begins with {name!r}; see gradmap log")
    if len(matches) > 1:
        ids = ", ".join(run.id for run in matches[:4])
        raise CommandError(f"{len(matches)} runs have an id that begins with {name!r}: {ids}; give more digits")
    return matches[0]


def dump_run(head: dict[str, Any], record: dict[str, Any]) -> str:
    """The text of a record's file. What is not a finite number is null."""
    content = json.loads(dump_json({_HEAD: with_digest(json.loads(dump_json(head))), **record}))
    first, *others = with_digest(content).items()
    rest = json.dumps(dict(others))
    return f"{{{json.dumps(first[0])}: {json.dumps(first[1])},\n{rest[1:]}\n"


def read_head(run: RunFile) -> dict[str, Any] | None:
    """The head of a record; None where it is not as it was written. A run whose process is gone is `killed`."""
    try:
        with run.path.open(encoding="utf-8") as file:
            line = file.readline()
        head = json.loads(line.rstrip().rstrip(",") + "}")[_HEAD]
        content = {name: part for name, part in head.items() if name != DIGEST}
        if head[DIGEST] != sha256_of_value(content) or not content.keys() >= {"id", "outcome"}:
            return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return _with_end(run, content)


def read_run(run: RunFile) -> dict[str, Any] | None:
    """A whole record, its head among it as `head`; None where it is not as it was written."""
    record, head = read_object(run.path), read_head(run)
    return None if not record or head is None else {**record, _HEAD: head}


def find_latest(store: Path, recipe: Path | None = None) -> RunFile | None:
    """The latest run that came to figures: it reached its end, or missed a limit. `recipe`: of the recipe in this file alone."""
    place = None if recipe is None else str(recipe.resolve())
    for run in list_runs(store):
        head = read_head(run)
        is_whole = head is not None and head["outcome"] in (DONE, MISSED) and place in (None, head.get("recipe_path"))
        if is_whole and read_object(run.path):
            return run
    return None


def _with_end(run: RunFile, head: dict[str, Any]) -> dict[str, Any]:
    if head["outcome"] == RUNNING and not _is_locked(run.lock):
        return {**head, "outcome": KILLED}
    return head


def _is_locked(file: Path) -> bool:
    """Whether a process holds the lock on a file."""
    if not file.exists():
        return False
    from filelock import FileLock, Timeout

    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def settle_killed_runs(store: Path) -> None:
    """Drop the locks of runs whose processes are gone; their records say `running` for ever, which counts as killed."""
    for file in (store / FOLDER).glob("*.lock"):
        if _NAME.fullmatch(file.with_suffix(".json").name) and not _is_locked(file) and file.with_suffix(".json").exists():
            with suppress(OSError):
                file.unlink()
