"""Folders and files that get their name when they are finished, so that one with its name is complete.

A folder in the making lies beside its place as `.NAME.partial-XXXXXXXX`. Its process holds a lock (flock) on a file beside it. The
system lets go of the lock when the process ends, however it ends and wherever it ran. So a folder whose lock no process holds
was left by a killed process, and is cleared away by the next one that writes there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .shortages import name_place

_UNFINISHED = re.compile(r"\..*\.partial-[0-9a-f]{8}")
_LOCK = ".lock"
_OLD = ".old"
"""Ending of what a folder in the making replaces, where the file system cannot exchange two folders in one step."""
_LONGEST = 100
"""Characters of a name that the name of its folder in the making keeps."""
_FILES_SYNCED_ONE_BY_ONE = 256
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h
_ATTEMPTS = 100
"""Names tried for a folder: each may be cleared away, before it is locked, by a process that takes it for abandoned."""


def is_in_the_making(path: Path) -> bool:
    """Whether a path is, or lies in, a folder in the making, or is the lock of one: of this process or of another."""
    return any(_UNFINISHED.fullmatch(part.removesuffix(_LOCK)) for part in path.parts)


@contextmanager
def atomic_folder(final: Path, mode: int = 0o777) -> Iterator[Path]:
    """An empty folder beside `final`, of this process alone; all that has not been renamed from it vanishes.

    Clears away what killed processes left in the same place. `mode`: permissions of the folder, less the umask. Raises `OSError`
    where no file can be made there.
    """
    from filelock import FileLock, Timeout

    final.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished_folders(final.parent)
    for _ in range(_ATTEMPTS):
        draft = final.with_name(f".{final.name[:_LONGEST]}.partial-{secrets.token_hex(4)}")
        lock = FileLock(_lock_of(draft), blocking=False)
        with suppress(Timeout):  # another process clears away what looks abandoned until it is locked
            lock.acquire()
            break
    else:
        _lock_of(draft).touch()  # says why: filelock takes a folder where nothing can be made for one that is busy
        raise OSError(f"no file can be locked in {str(final.parent)!r}")
    try:
        draft.mkdir(mode)
        yield draft
    except Exception as error:
        name_place(error, draft, final)
        raise
    finally:
        _remove(draft, lock)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder of this process alone, which does not outlive it for long: the next process clears it away."""
    with atomic_folder(Path(tempfile.gettempdir()) / "gradmap", 0o700) as folder:
        yield folder


def clear_unfinished_folders(parent: Path) -> None:
    """Delete the unfinished folders that killed processes left in `parent`, and put back what they were about to replace."""
    from filelock import FileLock, Timeout

    for file in list(parent.iterdir()):
        if not (file.name.endswith(_LOCK) and _UNFINISHED.fullmatch(file.name.removesuffix(_LOCK))):
            continue
        lock = FileLock(file, blocking=False)
        try:
            lock.acquire()
        except (Timeout, OSError):  # its process runs, or belongs to another user
            continue
        _remove(file.with_name(file.name.removesuffix(_LOCK)), lock)


def _remove(draft: Path, lock: object) -> None:
    """Delete what is left of a folder in the making, then its lock, which is held."""
    old = draft.with_name(draft.name + _OLD)
    if old.exists():  # killed between the two renames of `_exchange`
        target = Path(os.readlink(old / _LOCK)) if (old / _LOCK).is_symlink() else None
        if target is not None and not target.exists():
            (old / _LOCK).unlink()
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(draft, ignore_errors=True)
    if not draft.exists() and not old.exists():
        with suppress(OSError):
            _lock_of(draft).unlink()
    lock.release()  # type: ignore[attr-defined]


def _lock_of(draft: Path) -> Path:
    return draft.with_name(draft.name + _LOCK)


def replace_folder(new: Path, target: Path) -> None:
    """Give a folder in the making its name. It is on disk by then; another folder of that name is gone only afterwards.

    Where the file system can exchange two folders in one step, a folder of that name is there at any time.
    """
    _sync_folder(new)
    try:
        new.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _exchange(new, target)
    _sync(target.parent)


def _exchange(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; what was there lies in `new` afterwards, or is gone."""
    with suppress(OSError, AttributeError):  # another C library, or a file system that cannot
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
    old = new.with_name(new.name + _OLD)
    (target / _LOCK).symlink_to(target.absolute())  # where it belongs, should this process be killed between the two renames
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        (old / _LOCK).unlink()
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_file(file: Path, text: str, folder: Path) -> None:
    """Write a whole text file: under its name is the old text or the new one, also after a power cut.

    `folder`: one on the same disk, of this process alone.
    """
    draft = folder / secrets.token_hex(8)
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Have the disk keep all files in a folder."""
    paths = [folder, *folder.rglob("*")]
    if len(paths) > _FILES_SYNCED_ONE_BY_ONE and hasattr(os, "sync"):
        os.sync()
        return
    for path in paths:
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # has no such thing as a folder's own data
    number = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
