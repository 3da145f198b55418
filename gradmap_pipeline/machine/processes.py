"""Other processes of a run: they end with this one, however it ends, and how they ended is told by its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ..errors import CapacityError, GradmapError, Interruption, StageError
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
_PATIENCE = 1.0
"""Seconds until the output of a killed program has ended."""
_MOST_SAID = 1 << 18
"""Bytes that a program which is asked something may print."""


def tie(command: Sequence[str]) -> list[str]:
    """A command that runs the given one, and ends with the process that starts it."""
    if sys.platform == "win32":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]


def ask_program(command: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """Run a program that must answer at once; return its exit code and all that it printed.

    None as the code: it took too long, or printed without end. Then it is killed, with all that it has started. Raises `OSError`
    where it cannot be started.
    """
    process = subprocess.Popen(
        tie(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=variables,
        start_new_session=True,
    )
    said: list[bytes] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda read: said.append(read(_MOST_SAID)), args=(process.stdout.read,), daemon=True)
    reader.start()
    try:
        reader.join(seconds)
        is_whole = bool(said) and len(said[0]) < _MOST_SAID
        code = process.wait(seconds) if is_whole else None
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _kill_session(process)
        reader.join(_PATIENCE)
        if not reader.is_alive():  # else a process that left the session holds the pipe, and closing would wait for it
            process.stdout.close()
    return code, b"".join(said).decode("utf-8", "replace")


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, and those that it has left behind in it."""
    with suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def explain_end(process: str, code: int, said: str, where: str = "") -> GradmapError:
    """The error for a process that ended with an exit code other than 0. `said`: what it printed; `where`: all of that is.

    A shortage is a `CapacityError`, a signal from outside an `Interruption`, a crash or any other end a `StageError`.
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
