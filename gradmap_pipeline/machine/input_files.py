"""Files that the command line names: regular ones, and pipes that another program writes into."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from .file_kinds import describe_other

_PATIENCE = 5.0
"""Seconds that a named pipe is waited for until a program writes into it."""
_PAUSE = 0.02


def read_input(path: Path, most: int) -> bytes:
    """At most so many bytes of a file, of standard input, or of a pipe, as `<(...)` makes one.

    Raises `ValueError` with what is there instead, `OSError` where it cannot be read.
    """
    status = path.stat()
    if not _is_standard_input(status):
        if stat.S_ISFIFO(status.st_mode):
            return _read_pipe(path, most)
        other = describe_other(path)
        if other is not None:
            raise ValueError(f"it is {other}")
    with path.open("rb") as file:
        return file.read(most)


def _is_standard_input(status: os.stat_result) -> bool:
    try:
        return os.path.samestat(status, os.fstat(0)) and not stat.S_ISDIR(status.st_mode)
    except OSError:  # it is closed
        return False


def _read_pipe(path: Path, most: int) -> bytes:
    """All that is written into a pipe, once a program does; opening a pipe into which no program writes would wait forever."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(number, "rb", buffering=0) as pipe:
        deadline = time.monotonic() + _PATIENCE
        while not (start := pipe.read(most)):  # b"": no program writes; None: one will
            if start == b"" and time.monotonic() > deadline:
                raise ValueError("it is a pipe into which nothing writes")
            time.sleep(_PAUSE)
        os.set_blocking(number, True)
        read = [start]
        while (size := sum(map(len, read))) < most and (more := pipe.read(most - size)):
            read.append(more)
        return b"".join(read)
