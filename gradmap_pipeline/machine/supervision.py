"""A command under a limit on its address space (`ulimit -v`), where libraries abort instead of raising an error.

The command runs in a process of its own; this one says what an abort means.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from ..errors import CapacityError
from ..interruptions import explain_interruption

OUR_CODES = (0, 2, 3, 4, 5, 130)
_LEAST = 3 << 29
_PATIENCE = 20
"""Seconds that a process has to end when it is interrupted: a library that spins on failing allocations never hears of it."""
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def address_limit() -> int | None:
    """Bytes of address space this process may have; None: no limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def check_address_space() -> None:
    """Raise `CapacityError` where the limit on address space is below what the libraries of any run need.

    So close to nothing, some of them spin on allocations that fail instead of raising an error.
    """
    limit = address_limit()
    if limit is not None and limit < _LEAST:
        raise CapacityError(
            f"the limit on address space (ulimit -v) is {limit >> 20} MiB, and torch and transformers alone need "
            f"{_LEAST >> 20} MiB; raise or remove it"
        )


def supervise() -> tuple[int, str] | None:
    """Fork: None in the process that is to do the work. In the other, when it has ended: exit code, and a message or nothing."""
    watched = [number for name in _SIGNALS if signal.getsignal(number := getattr(signal, name)) is not signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _end_with(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        return None

    is_interrupted = False

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        os.kill(child, number)
        signal.alarm(_PATIENCE)

    for number in watched:
        signal.signal(number, pass_on)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in OUR_CODES:
        return code, ""
    if is_interrupted:
        return 130, explain_interruption(sys.argv[1:])
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
