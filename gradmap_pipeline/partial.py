"""Folders that get their name when they are finished, so that one with its name is complete."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOST = platform.node()


@contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, of this process alone; whatever has not been renamed from it vanishes.

    Clears away what killed processes left under the same name.
    """
    clear_partial_folders(final.parent, final.name)
    partial = final.with_name(f".{final.name}.partial-{_HOST}-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear_partial_folders(parent: Path, name: str = "*") -> None:
    """Delete partial folders of this process, and of processes of this machine that run no more."""
    for folder in [*parent.glob(f".{name}.partial-{_HOST}-*"), *parent.glob(f".{name}.old-{_HOST}-*")]:
        process = folder.name.rpartition("-")[2]
        if process.isdigit() and (int(process) == os.getpid() or not _is_running(int(process))):
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Move a finished folder into place; the one that was there is gone only after the new one stands."""
    old = target.with_name(f".{target.name}.old-{_HOST}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
