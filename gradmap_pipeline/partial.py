"""Folders that get their name when they are finished, so that one with its name is complete."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Iterator
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
    """Delete partial folders of this process, and of processes of this machine that run no more; put back what they replaced."""
    for folder in _ours(parent.glob(f".{name}.old-{_HOST}-*")):
        target = folder.with_name(folder.name[1:].rpartition(".old-")[0])
        if target.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.rename(target)  # killed between the two renames of `replace_folder`
    for folder in _ours(parent.glob(f".{name}.partial-{_HOST}-*")):
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Move a finished folder into place; the one that was there is gone only after the new one stands."""
    old = target.with_name(f".{target.name}.old-{_HOST}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _ours(folders: Iterable[Path]) -> list[Path]:
    """Those of this process, and those whose process is gone."""
    ours = []
    for folder in folders:
        process = folder.name.rpartition("-")[2]
        if process.isdigit() and (int(process) == os.getpid() or not _is_running(int(process))):
            ours.append(folder)
    return ours


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
