"""How a command ends: signals, the message and exit code for whatever is raised, and the last line of defence."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from ..interruptions import explain_interruption, is_importing, note_interruption
from ..machine.launch import is_one_of_many
from ..machine.streams import error_number

if TYPE_CHECKING:
    from ..run.events import Reporter

INTERRUPTED = 130
_UNFORESEEN = 4
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_SAME_SECONDS = 0.5
"""`timeout` and shells send one signal twice; a signal within this time of the first is the first."""
_REPEAT_SECONDS = 0.05
_SHOW_CURSOR = b"\x1b[?25h"


@dataclass
class _State:
    """State of the signals of this process."""

    number: int | None = None
    """The first that came."""
    since: float = 0.0
    is_repeated: bool = False
    """Whether the next signal is the first one, sent again because it came where nothing could be raised."""
    is_telling: bool = False
    """Whether the end of the command is being told, whatever it was: an interruption changes nothing any more."""
    exit_code: int | None = None
    """Once everything is told and only the interpreter is left to end."""


_state = _State()


def watch_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP are raised as `KeyboardInterrupt`, once; a later one ends the process at once.

    What is ignored, as under nohup, stays ignored.
    """
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.unraisablehook = _repeat_lost
    atexit.register(_ignore_signals)  # registered first, it is called last


def _ignore_signals() -> None:
    """For the moments in which Python has taken its handlers away, and the process still lives."""
    for name in _SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _state.exit_code is not None:
        os._exit(_state.exit_code)
    now = time.monotonic()
    if _state.number is None or _state.is_repeated:
        if _state.number is None:
            _state.number, _state.since = number, now
            note_interruption()
        _state.is_repeated = False
        if _state.is_telling:
            return
        if is_importing(frame):
            _repeat()
            return
        raise KeyboardInterrupt
    if now - _state.since > _SAME_SECONDS:
        with suppress(OSError):
            number = error_number()
            os.write(number, (_SHOW_CURSOR if os.isatty(number) else b"") + b"error: interrupted again; ended at once\n")
        os._exit(INTERRUPTED)


def _repeat() -> None:
    """Send the signal again, a moment later."""

    def send() -> None:
        _state.is_repeated = True
        os.kill(os.getpid(), _state.number or signal.SIGINT)

    timer = threading.Timer(_REPEAT_SECONDS, send)
    timer.daemon = True
    timer.start()


def _repeat_lost(lost: sys.UnraisableHookArgs) -> None:
    """An interruption that came inside a destructor or a callback, where Python cannot raise it, is sent again."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        _repeat()
    else:
        sys.__unraisablehook__(lost)


@contextmanager
def endings(reporter: Reporter | None = None, store: Path | None = None) -> Iterator[None]:
    """Tell what went wrong, and exit with its code. `store`: where a traceback is kept, if that folder is there."""
    try:
        yield
    except BaseException as error:
        sys.exit(tell_end(error, reporter, store))


def tell_end(error: BaseException, reporter: Reporter | None = None, store: Path | None = None) -> int:
    """Tell one error, whatever it is, unless the leading process of the run does; return its exit code."""
    code, message, where = _describe(error, store)
    _state.is_telling = True
    if reporter is None:
        from ..report.reporters import make_reporter

        reporter = make_reporter(json="--json" in sys.argv, quiet=True)
    if not getattr(error, "is_told_elsewhere", False):
        reporter.error(code, message, where)
    return code


def tell_plainly(failure: BaseException) -> int:
    """Say that an end could not be told, without importing anything; return the exit code."""
    is_short = isinstance(failure, MemoryError | ImportError | SystemError)
    text = f"error: {'ran out of memory' if is_short else 'ended'}: {type(failure).__name__} while an error was told\n"
    with suppress(OSError):
        os.write(error_number(), text.encode("ascii", "backslashreplace"))
    return 3 if is_short else _UNFORESEEN


def has_told() -> bool:
    """Whether the end of the command has been told."""
    return _state.is_telling


def _describe(error: BaseException, store: Path | None) -> tuple[int, str, str | None]:
    """Exit code, message and place of an error."""
    is_common = getattr(
        error, "is_agreed", False
    )  # once one of several processes has failed, a launcher ends the others by signals
    if isinstance(error, KeyboardInterrupt) or (_state.number is not None and not is_common):
        # Libraries turn an interruption into errors of theirs.
        return INTERRUPTED, _describe_interruption(), None
    from ..errors import CapacityError, GradmapError, name_error, text_of
    from ..machine.shortages import find_shortage

    is_ours = isinstance(error, GradmapError)
    shortage = None if isinstance(error, CapacityError) else find_shortage(error)
    where = error.where if isinstance(error, GradmapError) else None
    if shortage is not None:
        return CapacityError.exit_code, shortage.explain([] if store is None else [store]), where
    if is_ours:
        return error.exit_code, text_of(error), where  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.strerror or error}: {error.filename}"
    else:
        message = f"{name_error(error)}, which nothing here foresees"
    return _UNFORESEEN, f"{message}; {_keep_traceback(error, store)}", None


def _describe_interruption() -> str:
    if _state.number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
        return "ended by torchrun, as it does when one process has; what is finished is kept: run the same command to go on"
    return explain_interruption(sys.argv[1:])


def _keep_traceback(error: BaseException, store: Path | None) -> str:
    """Write the traceback into the store, if there is one, else into the temporary folder; say where it is."""
    text = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace")
    if store is not None and store.is_dir():
        with suppress(OSError):
            file = store.resolve() / "traceback.txt"
            file.write_bytes(text)
            return f"traceback in {file}"
    try:
        number, name = tempfile.mkstemp(prefix="gradmap-traceback-", suffix=".txt")
        with open(number, "wb") as stream:
            stream.write(text)
    except OSError as failure:
        return f"its traceback cannot be kept: {failure}"
    return f"traceback in {name}"


def finish(code: Any) -> NoReturn:
    """End the process: what is printed is out, and a signal that still comes changes nothing."""
    exit_code = code if isinstance(code, int) else _UNFORESEEN
    _state.exit_code = exit_code
    sys.unraisablehook = lambda _: None  # all is told; what exit handlers of libraries still raise has no effect
    if exit_code == INTERRUPTED:
        # Where the interruption passed through code that C runs, Python would end as killed by SIGINT, whatever code is given.
        with suppress(BaseException):
            atexit._run_exitfuncs()
        _flush()
        os._exit(exit_code)
    _flush()
    if is_one_of_many(os.environ):
        # Threads of the communication library may outlive the interpreter, and abort a process that has done its work.
        os._exit(exit_code)
    sys.stdout = sys.stderr = None  # else Python flushes them, and where that fails ends with a code of its own
    sys.exit(exit_code)


def _flush() -> None:
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
