"""What a piece of code does besides returning a value: what it prints, writes, starts and changes in this process."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..machine.atomic_folder import is_in_the_making

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {  # audit event: positions of the paths that it changes
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
}
_VARIABLES_OF_LIBRARIES = ("TORCH", "KINETO", "KMP_", "TRITON")
"""Parts at the start of names: torch sets these when its modules are first imported."""
_PATIENCE = 2.0
"""Seconds for a thread to end after the code has returned."""


State = tuple[int, int] | None
"""State of a file: its size and the time of its last change; of a folder: zeros; None: nothing is there."""


@dataclass
class Seen:
    """What a piece of code did. Files are those that Python opens; what a library writes by itself is not seen."""

    printed: str = ""
    """What was printed on standard output."""
    changed: dict[Path, State] = field(default_factory=dict)
    """Paths made, opened for writing, renamed or removed; what they were before."""
    threads: list[str] = field(default_factory=list)
    """Names of threads that it started and that still run."""
    process: list[str] = field(default_factory=list)
    """What it changed in this process: `the current folder`."""
    peak: int | None = None
    """Most bytes that the process had resident; None where the system does not say."""

    def left_outside(self, places: Collection[Path]) -> list[Path]:
        """Paths outside some places that are other than before: not those that it made and removed again.

        What lay in a folder that it made and removed was not there before either, also where a library wrote it unseen. Folders in
        the making of other processes are left out: each process looks whether they were abandoned.
        """
        passing = [path for path, before in self.changed.items() if before is None and _state_of(path) is None]
        own = (*places, *passing, Path("/dev"), Path("/proc"))
        outside = [path for path in self.changed if not any(path.is_relative_to(place) for place in own)]
        left = [path for path in outside if _state_of(path) != self.changed[path] and "__pycache__" not in path.parts]
        return [path for path in left if not is_in_the_making(path)]


_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []


def _tell_listeners(event: str, arguments: tuple[Any, ...]) -> None:
    for listen in _listeners:
        listen(event, arguments)


@contextmanager
def watch() -> Iterator[Seen]:
    """Watch what runs inside; the fields are filled at the end. Standard output is kept, and not shown."""
    seen = Seen()
    before, state = set(threading.enumerate()), _state_of_process()
    _forget_peak()
    with _files(seen), _output(seen):
        yield seen
    seen.peak = _read_peak()
    started = [thread for thread in threading.enumerate() if thread not in before]
    for thread in started:
        thread.join(_PATIENCE / len(started))
    seen.threads = [thread.name for thread in started if thread.is_alive()]
    seen.process = [name for name, value in _state_of_process().items() if value != state[name]]


@contextmanager
def _files(seen: Seen) -> Iterator[None]:
    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            paths = [path] if isinstance(flags, int) and flags & _WRITING else []
        else:
            paths = [arguments[position] for position in _PATHS.get(event, ())]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                place = Path(os.path.abspath(os.fsdecode(path)))
                seen.changed.setdefault(place, _state_of(place))

    if not getattr(_tell_listeners, "is_hooked", False):  # a hook stays as long as the process
        sys.addaudithook(_tell_listeners)
        _tell_listeners.is_hooked = True  # type: ignore[attr-defined]
    _listeners.append(listen)
    try:
        yield
    finally:
        _listeners.remove(listen)


@contextmanager
def _output(seen: Seen) -> Iterator[None]:
    """Keep what goes to standard output, from Python and from libraries."""
    with tempfile.TemporaryFile() as kept:
        _flush_output()
        ours, stream = os.dup(1), sys.stdout
        os.dup2(kept.fileno(), 1)
        try:
            with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as replacement:
                sys.stdout = replacement
                yield
        finally:
            _flush_output()
            sys.stdout = stream
            os.dup2(ours, 1)
            os.close(ours)
            kept.seek(0)
            seen.printed = kept.read().decode(errors="replace")


def _flush_output() -> None:
    if not sys.stdout.closed:
        sys.stdout.flush()


def _state_of(path: Path) -> State:
    try:
        status = path.lstat()
    except OSError:
        return None
    return (0, 0) if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _read_peak() -> int | None:
    """Source: proc(5), VmHWM."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) * 1024 if match else None
    return None


def _state_of_process() -> dict[str, Any]:
    import torch

    return {
        "the current folder": os.getcwd(),
        "variables of the environment": {k: v for k, v in os.environ.items() if not k.startswith(_VARIABLES_OF_LIBRARIES)},
        "torch's default type": torch.get_default_dtype(),
        "torch's number of threads": torch.get_num_threads(),
        "whether torch records gradients": torch.is_grad_enabled(),
        "whether torch uses deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
