"""Folders that steps write for other programs: where one may be written, and what it may take the place of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ..artifacts import LINEAGE, PAGE, ExportedFile
from ..errors import GradmapError, OptionError, StageError
from ..machine.atomic_folder import atomic_folder, replace_folder
from ..machine.digests import sha256_of, sha256_of_value
from ..machine.shortages import is_shortage

OWN_DIGEST = "sha256"
"""Key of a lineage under which it has the digest of all that it says besides."""

_MODE = 0o644
"""Permissions of exported files, less the umask."""

State = tuple[int, int, int]
"""Size in bytes, time of modification in ns, inode."""


def check_target(folder: Path, overwrite: bool, *, reads_files: bool = False) -> None:
    """Raise `OptionError` unless an export can be written there.

    `reads_files`: read the files of an earlier export, too, to see whether they are still as they were written. Otherwise names and
    sizes are looked at.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError("to", f"{str(folder)!r} is {'a file' if folder.is_file() else 'not a folder'}; name a folder")
    above = next((parent for parent in folder.resolve().parents if parent.exists()), folder.resolve())
    if not above.is_dir() or not _can_hold_files(above):
        raise OptionError("to", f"{str(folder)!r} cannot be made: {str(above)!r} is not a folder that can be written to")
    if folder.is_dir() and not overwrite:
        for name, reason in find_foreign_files(folder, reads_files=reads_files):
            raise OptionError("to", _explain(folder, name, reason))


def _can_hold_files(folder: Path) -> bool:
    """Tried with a file that has no name: the superuser may write to /proc, and yet there are no new files there."""
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError as error:
        if is_shortage(error):
            raise
        return False


def find_foreign_files(folder: Path, *, reads_files: bool = True) -> Iterator[tuple[str, str]]:
    """Files in a folder that no export left there as they are: name inside the folder, and why it is not taken for one.

    An earlier export is known by the digests in its lineage, not by names alone.
    """
    written = read_written_files(folder)
    for file in sorted(_walk(folder)):
        name = file.relative_to(folder).as_posix()
        if name == LINEAGE and written is not None:
            continue
        if written is None or name not in written:
            yield name, "is not part of an export"
        elif not _is_as_written(file, written[name], reads_files):
            yield name, "has been changed since it was exported"


def _is_as_written(file: Path, written: ExportedFile, reads_files: bool) -> bool:
    has_same_size = not file.is_symlink() and file.stat().st_size == written.size
    return has_same_size and (not reads_files or _digest_in(file, _state_of(file), file.stat().st_ctime_ns) == written.sha256)


@lru_cache(maxsize=4096)
def _digest_in(file: Path, state: State, changed: int) -> str:
    """Digest of a file in a state, which has not changed since a time in ns that no program can set.

    An export is looked at when a run begins and around its step, and read once.
    """
    return sha256_of(file)


def find_clashing_export(target: Path) -> str | None:
    """How a folder that is about to be written, an absolute path, would spoil another export: it lies in one, or holds one."""
    outer = find_surrounding_export(target)
    if outer is not None:
        return f"lies in {str(outer)!r}, which is an export"
    inner = next((file.parent for file in sorted(target.rglob(LINEAGE)) if file.parent != target and _is_export(file.parent)), None)
    return None if inner is None else f"holds {str(inner)!r}, which is another export"


def find_surrounding_export(path: Path) -> Path | None:
    """The export that a path, an absolute one, lies in."""
    return next((folder for folder in path.parents if _is_export(folder)), None)


def _is_export(folder: Path) -> bool:
    """Whether an export was left there, also one that was edited since."""
    try:
        file = folder / LINEAGE
        lineage = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(lineage, dict) and {"files", OWN_DIGEST} <= lineage.keys()


def read_written_files(folder: Path) -> dict[str, ExportedFile] | None:
    """Files of an export, without its lineage, by what that says; None where there is none that is as it was written."""
    try:
        lineage = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        content = {key: value for key, value in lineage.items() if key != OWN_DIGEST}
        files = {str(name): ExportedFile.model_validate(file) for name, file in lineage["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return files if lineage.get(OWN_DIGEST) == sha256_of_value(content) else None


def _walk(folder: Path) -> Iterator[Path]:
    """All that is not a folder; of an empty folder, the folder."""
    for path in folder.iterdir():
        if not path.is_dir() or path.is_symlink():
            yield path
        elif any(path.iterdir()):
            yield from _walk(path)
        else:
            yield path


def _explain(folder: Path, name: str, reason: str) -> str:
    return (
        f"folder {str(folder)!r} holds {name!r}, which {reason}; choose another folder, move that file away, or set "
        "overwrite: true to delete it"
    )


@dataclass(frozen=True)
class NewFolder:
    """A folder for other programs in the making: filled at `path`, it gets its place in `finish`."""

    path: Path
    target: Path
    given_up: Mapping[str, State]
    """Files in the target that may be deleted though no export left them there."""
    replaced: str = ""
    """What the folder takes the place of, to be told after its name: ` in place of an export of 22 layers`. Empty: of nothing."""

    def finish(self, lineage: dict[str, Any], files: Mapping[str, ExportedFile]) -> dict[str, ExportedFile]:
        """Write how the folder came to be, for machines and for people, and put it in its place; return all its files.

        All files may be read by whom a new file of this process may be: libraries that write through a temporary file leave 0600.

        Raises `StageError`, and replaces nothing, where somebody has put files into the target since work on it began.
        """
        content = json.loads(json.dumps(lineage, allow_nan=False))
        content.pop(OWN_DIGEST, None)  # of the export that this one is made from
        files = {**files, **self._write_page(content)}
        content[OWN_DIGEST] = sha256_of_value(content)
        (self.path / LINEAGE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        everything = {**files, LINEAGE: describe_file(self.path / LINEAGE)}
        mode = (self.path / LINEAGE).stat().st_mode & _MODE  # as new as a file can be, so it has the umask
        for name in everything:
            (self.path / name).chmod(mode)
        if self.target.is_dir():
            for name, _ in find_foreign_files(self.target):
                if self.given_up.get(name) != _state_of(self.target / name):
                    raise StageError(
                        f"{name!r} has come into {str(self.target)!r}, or has changed there, while the export was made; nothing "
                        "was replaced. Move it away and run again"
                    )
        replace_folder(self.path, self.target)
        return everything

    def _write_page(self, lineage: dict[str, Any]) -> dict[str, ExportedFile]:
        """The page of an export, made from its lineage alone, which then has its digest; none where the folder is no export."""
        from ..page.facts import facts_of_lineage
        from ..page.page import make_page

        if not isinstance(lineage.get("files"), dict):
            return {}
        lineage["files"].pop(PAGE, None)  # of the export that this one is made from
        facts = facts_of_lineage(lineage)
        if facts is None:
            return {}
        (self.path / PAGE).write_text(make_page(facts), encoding="utf-8")
        page = describe_file(self.path / PAGE)
        lineage["files"] = dict(sorted({**lineage["files"], PAGE: page.model_dump()}.items()))
        return {PAGE: page}


@contextmanager
def new_folder(to: Path, overwrite: bool, *sources: Path) -> Iterator[NewFolder]:
    """A folder to fill and finish; it vanishes unless it is finished. `sources`: folders that are read to fill it.

    Errors on the way name the folder as it would have been called.

    Raises `StageError` where it would take the place of files that no export left there, unless `overwrite`.
    """
    target = to.resolve()
    for source in sources:
        if overlaps(target, source.resolve()):
            raise StageError(f"{str(to)!r} is, holds or lies in {str(source)!r}, which is being read; write to another folder")
    clash = find_clashing_export(target)
    if clash is not None:
        raise StageError(f"{str(to)!r} {clash}; write to another folder")
    foreign = dict(find_foreign_files(target)) if target.is_dir() else {}
    if foreign and not overwrite:
        raise StageError(_explain(to, *next(iter(foreign.items()))))
    states = {name: _state_of(target / name) for name in foreign}
    with atomic_folder(target) as path:
        try:
            yield NewFolder(path, target, states, _describe_earlier(target))
        except GradmapError as error:
            error.args = tuple(said.replace(str(path), str(to)) if isinstance(said, str) else said for said in error.args)
            raise


def _describe_earlier(target: Path) -> str:
    """The export that is there, if one is."""
    try:
        kept = json.loads((target / LINEAGE).read_text(encoding="utf-8"))["layers_kept"]
        return f" in place of an export of {len(kept)} layers"
    except (OSError, ValueError, KeyError, TypeError):
        return " in place of what was there" if target.is_dir() and any(target.iterdir()) else ""


def overlaps(one: Path, other: Path) -> bool:
    """Whether one of two folders is, or lies in, the other."""
    return one.is_relative_to(other) or other.is_relative_to(one)


def _state_of(file: Path) -> State:
    status = file.lstat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def describe_file(file: Path) -> ExportedFile:
    """Its size and digest."""
    return ExportedFile(size=file.stat().st_size, sha256=sha256_of(file))


def describe_folder(folder: Path, known: Mapping[str, ExportedFile] | None = None) -> dict[str, ExportedFile]:
    """All files of a folder, by their names in it. `known`: those whose size and digest need not be read again."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: (known or {}).get(name) or describe_file(file) for name, file in files.items()}


def copy_files(source: Path, names: Iterator[str], folder: Path) -> None:
    """Copy files of a folder, by their names in it, into another."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
