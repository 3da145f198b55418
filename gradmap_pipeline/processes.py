"""Other processes of a run: they end with this one, however it ends, and how they ended is told by its name."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from .errors import CapacityError, GradmapError, Interruption, StageError
from .shortages import find_shortage_in

_TIE = """
import os, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
except Exception:
    pass
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""PR_SET_PDEATHSIG, SIGKILL: the kernel kills the program when its parent ends. It outlives exec; only Linux has it."""
_INTERRUPTIONS = ("SIGINT", "SIGTERM", "SIGHUP")
_LINES_SEARCHED = 200


def tie(command: Sequence[str]) -> list[str]:
    """A command that runs the given one, and ends with the process that starts it."""
    import os

    if sys.platform == "win32":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]


def explain_end(process: str, code: int, said: str, where: str = "") -> GradmapError:
    """The error for a process that ended with an exit code other than 0. `said`: what it printed; `where`: all of that is.

    A shortage is a `CapacityError`, a signal that somebody sent an `Interruption`, a crash or any other end a `StageError`.
    """
    name = _name_signal(-code) if code < 0 else ""
    if name in _INTERRUPTIONS:
        return Interruption(f"{process} was interrupted ({name}); what is finished is kept: run the same command to go on")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    shortage = find_shortage_in("\n".join(lines[-_LINES_SEARCHED:]))
    if shortage is not None:
        return CapacityError(f"{process} {shortage.explain()}{where}")
    if name == "SIGKILL":
        return CapacityError(f"{process} was killed by signal 9, as the system does when memory runs out{where}")
    if name == "SIGXFSZ":
        return CapacityError(f"{process} wrote a file larger than the limit on the size of files (ulimit -f){where}")
    last = f": {lines[-1]}" if lines else ""
    if name:
        return StageError(f"{process} crashed ({name}){last}{where}")
    return StageError(f"{process} ended with code {code}{last}{where}")


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
