"""Whether an error says that memory or disk ran out, whichever library raised it, and what to do about it."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import GradmapError, text_of

_DISK_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = re.compile(
    r"no space left on device|disk quota exceeded|file too large|not enough space on the disk"
    rf"|(?:os error|errno) (?:{errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b"
    r"|\d+ requested and \d+ written"  # NumPy's tofile
    r"|inline_container.*unexpected pos|ios_base::clear|basic_ios::clear",  # torch.save
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"(?:can't|cannot|could not|failed to|unable to) allocate|memory allocation of \d+ bytes failed|out of memory|not enough memory"
    r"|bad_alloc|bad allocation|failed to map segment from shared object(?!.*not permitted)|can't start new thread"
    rf"|pthread_create failed|(?:os error|errno) {errno.ENOMEM}\b",
    re.IGNORECASE,
)
_LARGE = re.compile(rf"file too large|(?:os error|errno) {errno.EFBIG}\b", re.IGNORECASE)
_FULL_DISK = re.compile(
    rf"no space left|quota exceeded|not enough space|(?:os error|errno) (?:{errno.ENOSPC}|{errno.EDQUOT})\b", re.IGNORECASE
)
_PLACE = "gradmap_place"
"""Attribute of an error: where a shortage was met."""
_SHORT = 1 << 26
_FULL = 1 << 24
"""Bytes: a disk with less than this free is taken for the full one, where the error does not name it."""


@dataclass(frozen=True)
class Shortage:
    """What ran out."""

    resource: Literal["memory", "disk"]
    detail: str
    """The message of the library."""
    path: str | None = None
    """The file that could not be written, where the error names it."""

    def explain(self, places: Sequence[Path] = ()) -> str:
        """One sentence: what ran out, where, and what to do. `places`: folders that may lie on the full disk."""
        if self.resource == "memory":
            return f"ran out of memory: {self.detail}; close other programs, or use less with --memory or --dtype bfloat16"
        full = _find_full([*places, Path.cwd(), Path(tempfile.gettempdir())])
        if _LARGE.search(self.detail) or (full is None and not _FULL_DISK.search(self.detail) and _file_limit() is not None):
            path = self.path or next(map(str, places), None)
            where = f" at {path!r}" if path and path not in self.detail else ""
            limit = _file_limit()
            if limit is None:
                advice = "the file system holds none that large, so name a folder on another"
                return f"could not write a file{where}: {self.detail}; {advice}"
            return (
                f"could not write a file{where}: {self.detail}; the limit of this process on file size (ulimit -f) is "
                f"{limit / 2**20:.4g} MiB, so raise or remove it"
            )
        path = self.path or full
        where = f" at {path!r}" if path and path not in self.detail else ""
        advice = "free space there, or name folders on another disk (--store, options of the recipe, TMPDIR for temporary files)"
        return f"ran out of disk{where}: {self.detail}; {advice}"


def find_shortage(error: BaseException) -> Shortage | None:
    """What ran out, if that is what this error, or one that it was raised from, says."""
    chain = list(_causes(error))
    for cause in chain:
        resource = _resource_of(cause)
        if resource is not None:
            path = next((path for one in chain if (path := _path_of(one))), None) if resource == "disk" else None
            return Shortage(resource, _telling_line(cause), path)
    return None


def find_shortage_in(text: str) -> Shortage | None:
    """The shortage that another process wrote of: the last line that says so."""
    for line in reversed(text.splitlines()):
        resource = _resource_in(line)
        if resource is not None:
            return Shortage(resource, line.strip())
    return None


def _file_limit() -> int | None:
    """Bytes that a file of this process may hold; None: no limit."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def name_place(error: BaseException, draft: Path, final: Path) -> None:
    """Have an error that says a file grew too large, without its name, say which: the largest of a folder in the making.

    `final`: the name that the folder would have got.
    """
    shortage = find_shortage(error) if isinstance(error, Exception) else None
    if shortage is None or shortage.resource == "memory" or shortage.path is not None:
        return
    if not _LARGE.search(shortage.detail) and (_FULL_DISK.search(shortage.detail) or _file_limit() is None):
        return
    with suppress(OSError, AttributeError):
        sizes = {file: file.stat().st_size for file in draft.rglob("*") if file.is_file()}
        largest = max(sizes, key=lambda file: sizes[file], default=None)
        setattr(error, _PLACE, str(final if largest is None else final / largest.relative_to(draft)))


def is_shortage(error: BaseException) -> bool:
    """Whether memory or disk ran out."""
    return find_shortage(error) is not None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those it was raised from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _resource_of(error: BaseException) -> Literal["memory", "disk"] | None:
    if isinstance(error, GradmapError):  # its words are ours, and name limits of files and numbers as well
        return None
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "memory"
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in _DISK_NUMBERS:
            return "disk"
        return "memory" if error.errno == errno.ENOMEM else None
    if isinstance(error, SystemError | ImportError) and _is_address_space_used_up():
        return "memory"  # C code that cannot allocate breaks in many ways
    return _resource_in(text_of(error))


def _is_address_space_used_up() -> bool:
    """Whether this process has next to nothing left of the address space that a limit (`ulimit -v`) allows it."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return False
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return False
    import psutil

    return limit - int(psutil.Process().memory_info().vms) < _SHORT


def _resource_in(text: str) -> Literal["memory", "disk"] | None:
    if _DISK.search(text):
        return "disk"
    return "memory" if _MEMORY.search(text) else None


def _path_of(error: BaseException) -> str | None:
    """The file an error names."""
    noted = getattr(error, _PLACE, None)
    if isinstance(noted, str):
        return noted
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return next((str(target) for _, target, why in error.args[0] if _DISK.search(str(why))), None)
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return str(Path(name)) if isinstance(error, OSError) and isinstance(name, str) else None


def _find_full(places: Sequence[Path]) -> str | None:
    """The first folder whose disk has next to nothing free."""
    for place in places:
        with suppress(OSError):
            above = next(folder for folder in (place, *place.parents) if folder.exists())
            if shutil.disk_usage(above).free < _FULL:
                return str(place)
    return None


def _telling_line(error: BaseException) -> str:
    """The line of an error that says what ran out, else its first."""
    lines = text_of(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if _resource_in(line)), lines[0])
