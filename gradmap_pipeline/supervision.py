"""A command under a limit on its address space (`ulimit -v`), where libraries abort instead of raising an error.

The command runs in a process of its own; this one says what an abort means.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

OUR_CODES = (0, 2, 3, 4, 5, 130)
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def address_limit() -> int | None:
    """Bytes of address space this process may have; None: no limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def supervise() -> tuple[int, str] | None:
    """Fork: None in the process that is to do the work. In the other, when it has ended: exit code, and a message or nothing."""
    watched = [number for name in _SIGNALS if signal.getsignal(number := getattr(signal, name)) is not signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _end_with(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        return None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in watched:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in OUR_CODES:
        return code, ""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    limit = (address_limit() or 0) >> 20
    return 3, f"ran out of address space: a library {how} under the limit of {limit} MiB (ulimit -v); raise or remove the limit"


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, where it can."""
    import ctypes

    try:
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(OUR_CODES[-1])
