"""Standard output and error as this program writes them: a reader that has gone stops nothing, a full disk is told."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import CapacityError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Sink(io.FileIO):
    """A file descriptor whose reader may go. What cannot be written any more is dropped."""

    def __init__(self, descriptor: int, *, tells: bool) -> None:
        """`tells`: whether a full disk is an error; on standard error no message can be shown."""
        super().__init__(descriptor, "w", closefd=False)
        self._tells, self.is_lost = tells, False

    def close(self) -> None:
        """Nothing: the descriptor is open as long as the process."""

    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        while not self.is_lost:
            try:
                written: int | None = super().write(data)
            except OSError as error:
                self.is_lost = True
                if self._tells and error.errno in _SHORTAGES:
                    advice = "raise the limit on file size (ulimit -f)" if error.errno == errno.EFBIG else "free space on its disk"
                    raise CapacityError(f"standard output cannot be written: {error.strerror}; {advice}") from error
            else:
                if written is not None:
                    return written
                select.select([], [self.fileno()], [])  # another program has made it non-blocking
        return size


@dataclass
class _Ours:
    """Standard error, while others write elsewhere."""

    stream: IO[str] | None = None
    number: int | None = None
    """Its descriptor, where others write elsewhere below Python too."""


_ours = _Ours()


def is_lost(stream: IO[str]) -> bool:
    """Whether no program reads any more what is written to a stream."""
    sink = _sink_of(stream)
    return sink is not None and sink.is_lost


def _sink_of(stream: IO[str] | None) -> _Sink | None:
    """The sink of a stream that `guard_streams` made; None for another, as under pytest."""
    sink = getattr(getattr(stream, "buffer", None), "raw", None)
    return sink if isinstance(sink, _Sink) else None


def guard_streams() -> None:
    """Have `sys.stdout` and `sys.stderr` write through sinks, and characters that their encoding lacks as escapes.

    A standard stream that is closed is opened on the null device, so that no file of a run gets its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = _make_stream(sys.stdout, os.dup(1), tells=True)
    sys.stderr = _make_stream(sys.stderr, os.dup(2), tells=False)


def _make_stream(old: IO[str] | None, descriptor: int, *, tells: bool) -> io.TextIOWrapper:
    if old is not None:
        with suppress(OSError, ValueError):
            old.flush()
    sink = _Sink(descriptor, tells=tells)
    encoding = getattr(old, "encoding", None) or "utf-8"
    unbuffered = not tells or sink.isatty()
    return _Stream(_Buffer(sink), encoding, "backslashreplace", line_buffering=unbuffered)


class _Buffer(io.BufferedWriter):
    """What is written to a sink. It stays open, as the sink does, whatever a plugin does to `sys.stdout`."""

    def close(self) -> None:
        self.flush()

    def detach(self) -> Any:
        self.flush()
        return self.raw


class _Stream(io.TextIOWrapper):
    """The same as `_Buffer`, for text."""

    def close(self) -> None:
        self.flush()

    def detach(self) -> Any:
        self.flush()
        return self.buffer


@contextmanager
def set_aside() -> Iterator[None]:
    """What is written below Python meanwhile, by C or by other processes, is dropped. What this program writes is not.

    Only where `guard_streams` has given this program descriptors of its own.
    """
    if _sink_of(sys.stderr) is None:
        yield
        return
    kept = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "wb") as nowhere:
        for number, _ in kept:
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


def error_stream() -> IO[str]:
    """Standard error as this program writes its own errors to it, whatever else is kept off it."""
    return _ours.stream or sys.stderr


def error_number() -> int:
    """The descriptor of the same."""
    return 2 if _ours.number is None else _ours.number


@contextmanager
def sole_errors(log: Path | None, *, is_wanted: bool = True) -> Iterator[None]:
    """Standard error for our errors alone: what anything else prints meanwhile, below Python too, goes to a file.

    `log`: gets that file's content at the end, where there is any and its folder is there.
    """
    if not is_wanted:
        yield
        return
    import tempfile

    kept = sys.stderr
    is_process_wide = _sink_of(kept) is not None
    with tempfile.TemporaryFile() as others:
        writer = io.TextIOWrapper(io.FileIO(os.dup(others.fileno()), "w"), "utf-8", "backslashreplace", write_through=True)
        if is_process_wide:
            number = os.dup(2)
            os.dup2(others.fileno(), 2)
            _ours.number = number
        _ours.stream, sys.stderr = kept, writer
        try:
            yield
        finally:
            _ours.stream, sys.stderr = None, kept
            if is_process_wide:
                _ours.number = None
                os.dup2(number, 2)
                os.close(number)
            with suppress(OSError, ValueError):
                writer.close()
                others.seek(0)
                text = others.read()
                if text and log is not None and log.parent.is_dir():
                    log.write_bytes(text)


@contextmanager
def sole_output(is_wanted: bool = True) -> Iterator[IO[str]]:
    """Standard output for the caller alone: what anything else prints meanwhile, below Python too, goes to standard error."""
    ours = sys.stdout
    if not is_wanted:
        yield ours
        return
    ours.flush()
    is_process_wide = _sink_of(ours) is not None
    if is_process_wide:
        kept = os.dup(1)
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield ours
    finally:
        sys.stdout = ours
        if is_process_wide:
            with suppress(OSError):  # a plugin may have closed it
                os.dup2(kept, 1)
                os.close(kept)


@contextmanager
def plugin_code() -> Iterator[None]:
    """Code of a plugin runs meanwhile: what it prints goes to standard error, and both streams come back as they were."""
    errors = sys.stderr
    try:
        with sole_output():
            yield
    finally:
        sys.stderr = errors
