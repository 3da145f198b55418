"""A connection from each process of a run to the leading one, over which all learn at once that one has failed or is gone."""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..errors import GradmapError, StageError
from ..interruptions import OthersEnded, is_importing
from .told_errors import describe_error, rebuild_error

_IDLE, _INTERVAL, _PROBES = 6, 4, 3
"""A machine that does not answer for so many seconds, and so many probes after them, is gone."""
_GRACE = 6.0
"""Seconds that the main thread has to end in order once another process has failed."""
_ANSWER = 5.0
"""Seconds within which the leading process answers, and within which the cause of a broken exchange is known."""
_LINE = 1 << 16


class Lifeline:
    """What the processes of a run tell each other besides the data that they exchange: that one has failed, or is done.

    The leading process decides which error all end with, the first that it hears of. A process that is killed tells nothing; the
    system closes its connection. The main thread is interrupted where it does not exchange anything, and where it cannot be, the
    process ends all the same.
    """

    def __init__(self, rank: int, size: int, peers: Mapping[int, socket.socket], end: Callable[[GradmapError], Any]) -> None:
        """`peers`: connections by rank, of the leading process to all others, of another to that one. `end`: called where the main
        thread does not end, to tell the error; the process is ended after it."""
        self.rank, self.size = rank, size
        self.failure: GradmapError | None = None
        """What all processes end with, once one has failed."""
        self._source: int | None = None
        """The process from which it came here."""
        self._peers, self._end = dict(peers), end
        self._finished: set[int] = set()
        self._lock = threading.RLock()
        self._failed, self._closed = threading.Event(), threading.Event()
        self._main = threading.get_ident()
        self._main_knows = False
        """Whether the main thread ends with the failure already."""
        self._wake, self._woken = socket.socketpair()
        for peer in self._peers.values():
            _keep_alive(peer)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def fail(self, error: BaseException) -> BaseException:
        """Tell all processes that this one ends with an error. Returns the error that all end with."""
        with self._lock:
            self._main_knows = True
        if self.leads:
            self._settle(rebuild_error(describe_error(error)), 0)
            if isinstance(error, GradmapError):
                error.is_agreed = True
        elif self.failure is None:
            told = describe_error(error)
            if not getattr(error, "is_agreed", False):
                told["message"] += f" (in process {self.rank} of {self.size})"
            self._send(0, {"error": told})
            self._failed.wait(_ANSWER)
        if self.failure is None:  # the leading process does not answer, so nobody else tells it
            return error
        if self.leads and self._source == 0:
            return error  # with its traceback
        return self.failure

    def find_reason(self) -> GradmapError | None:
        """Why others do not take part in an exchange any more; None where that does not show."""
        self._failed.wait(_ANSWER)
        with self._lock:
            self._main_knows = self._main_knows or self.failure is not None
            return self.failure

    def close(self) -> None:
        """This process is done, or ends with the failure."""
        if self.failure is None:
            for rank in self._peers:
                self._send(rank, {"done": True})
        self._closed.set()
        self._wake.send(b"x")
        self._thread.join(2 * _GRACE)
        if self.failure is not None and self.leads:
            _left_open.append(self)  # until the process ends: then the others know that it has told the error
            return
        if self.failure is not None:
            self._await_leader()
        for open_socket in (*self._peers.values(), self._wake, self._woken):
            open_socket.close()

    def _await_leader(self) -> None:
        """Outlive the leading process a little: a launcher that sees this one end would end that one before it has told."""
        peer = self._peers[0]
        peer.settimeout(_GRACE)
        with suppress(OSError):
            while peer.recv(_LINE):
                pass

    def _watch(self) -> None:
        """Listen until the end of the run, or the first failure."""
        received = dict.fromkeys(self._peers, b"")
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while self.failure is None:
                for key, _ in selector.select():
                    if key.data is None:
                        if self.failure is None:
                            return
                        break
                    data = b""
                    with suppress(OSError):
                        data = self._peers[key.data].recv(_LINE)
                    *lines, received[key.data] = (received[key.data] + data).split(b"\n")
                    for line in lines:
                        self._hear(key.data, json.loads(line))
                    if not data:
                        selector.unregister(self._peers[key.data])
                        if key.data not in self._finished:
                            self._settle(self._explain_loss(key.data), key.data)
        self._end_main()

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if "done" in message:
            self._finished.add(rank)
        else:
            error = rebuild_error(message["error"])
            error.is_told_elsewhere = not self.leads
            self._settle(error, rank)

    def _explain_loss(self, rank: int) -> GradmapError:
        return StageError(
            f"process {rank} of {self.size} has ended without a message, as when it is killed or its machine fails. What is "
            "finished is kept; run the same command to go on"
        )

    def _settle(self, error: GradmapError, source: int) -> None:
        """Have all processes end with an error, unless they do with an earlier one."""
        with self._lock:
            if self.failure is not None:
                return
            if self.leads:
                for rank in self._peers:
                    self._send(rank, {"error": describe_error(error)})
            error.is_agreed = True
            self.failure, self._source = error, source
        self._failed.set()
        self._wake.send(b"x")

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        with suppress(OSError), self._lock:  # that it is gone shows elsewhere
            self._peers[rank].sendall(json.dumps(message).encode() + b"\n")

    def _end_main(self) -> None:
        """Interrupt the main thread, unless it ends by itself; end the process where that does not help."""
        assert self.failure is not None
        since, is_asked, has_known = time.monotonic(), False, False
        while not self._closed.wait(0.02):
            with self._lock:
                if self._main_knows and not has_known:
                    since, has_known = time.monotonic(), True
                frame = sys._current_frames().get(self._main)
                if not self._main_knows and not is_asked and not is_importing(frame):
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main), ctypes.py_object(OthersEnded))
                    is_asked = True
            if time.monotonic() - since > _GRACE:
                self._end(self.failure)
                os._exit(self.failure.exit_code)


_left_open: list[Lifeline] = []


def _keep_alive(peer: socket.socket) -> None:
    """Have the system notice that the machine at the other end is gone. A process that stands still is not gone."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limit = (_IDLE + _INTERVAL * _PROBES) * 1000
    options = {"TCP_KEEPIDLE": _IDLE, "TCP_KEEPINTVL": _INTERVAL, "TCP_KEEPCNT": _PROBES, "TCP_USER_TIMEOUT": limit}
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
