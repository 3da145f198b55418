"""Whether a `KeyboardInterrupt` comes from outside, or from code that raises it by itself; and where none may be raised."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType


class OthersEnded(KeyboardInterrupt):
    """Raised in the main thread of a process when another process of its run has failed."""


_KEEP_NOTHING = frozenset(["check", "diff", "init", "log", "plan", "recipes", "schema", "show", "stages", "verify"])
"""Commands that leave nothing behind before they have ended."""


@dataclass
class _Signals:
    """What is known of the signals of this process."""

    has_come: bool = False
    """Whether one that interrupts has come."""


_signals = _Signals()


def note_interruption() -> None:
    """Called by the handlers of this program, before they raise `KeyboardInterrupt`."""
    _signals.has_come = True


def has_interruption_come() -> bool:
    """Whether a signal has come that interrupts, whatever a library has made of the `KeyboardInterrupt`."""
    return _signals.has_come


def is_interruption(error: BaseException) -> bool:
    """Whether an error is an interruption from outside.

    Where Python's own handler is in place, as under pytest, nobody can tell: then every `KeyboardInterrupt` is one.
    """
    if not isinstance(error, KeyboardInterrupt):
        return False
    return isinstance(error, OthersEnded) or _signals.has_come or signal.getsignal(signal.SIGINT) is signal.default_int_handler


def explain_interruption(arguments: Sequence[str]) -> str:
    """What an interruption leaves of the command with these arguments."""
    if arguments and arguments[0] in _KEEP_NOTHING:
        return "interrupted; nothing was changed"
    return "interrupted; what is finished is kept: run the same command to go on"


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported. Libraries in C++ abort where their start is interrupted by an exception."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
