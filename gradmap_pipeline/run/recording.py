"""Keep the record of a run from its start to its end, whatever that is. No run fails because its record cannot be kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ..errors import CapacityError, GradmapError, QualityError, StageError, first_line, name_error
from ..interruptions import has_interruption_come, is_interruption
from ..machine.machine import Machine
from ..machine.shortages import find_shortage
from ..recipe.plan import Plan
from .events import Reporter
from .record import make_head, make_record
from .run_files import DONE, FAILED, INTERRUPTED, MISSED, RUNNING, dump_run, new_run_file, settle_killed_runs
from .store import Store

if TYPE_CHECKING:
    from .runner import RunState

_ATTEMPTS = 20
"""Times that a lock is tried; another run may hold it for a moment, to see whether this one lives."""
_PAUSE = 0.02
_INTERRUPTED = 130


class Recorder:
    """Writes the record of one run: a short one when it starts, and the whole when it ends."""

    def __init__(self, plan: Plan, store: Store, machine: Machine, reporter: Reporter) -> None:
        self._plan, self._store, self._machine, self._reporter = plan, store, machine, reporter
        self._run = new_run_file(store.root)
        self._started, self._clock = datetime.now(timezone.utc), time.monotonic()
        self._resources = ExitStack()
        self._is_failing = False
        self.state: RunState | None = None
        """Where the run stands, once its model is known."""

    def begin(self) -> None:
        """Say that the run has started."""
        with self._told():
            self._run.path.parent.mkdir(parents=True, exist_ok=True)
            settle_killed_runs(self._store.root)
            self._lock()
            self._write(RUNNING, None, "")

    def end(self, error: BaseException | None = None) -> None:
        """Say how the run has ended."""
        with self._told():
            self._write(*_describe_end(error))
        self._resources.close()
        with suppress(OSError):
            self._run.lock.unlink(missing_ok=True)

    def _write(self, outcome: str, exit_code: int | None, failure: str) -> None:
        seconds = time.monotonic() - self._clock
        ended = {"outcome": outcome, "exit_code": exit_code, "failure": failure, "seconds": seconds}
        started = {"id": self._run.id, "started_at": self._started.strftime("%Y-%m-%dT%H:%M:%SZ")}
        record: dict[str, Any] = make_record(self._plan, self._machine, self.state, seconds, failure)
        self._store.save_run(self._run.path, dump_run({**started, **make_head(self._plan, record), **ended}, record))

    def _lock(self) -> None:
        from filelock import FileLock, Timeout

        for _ in range(_ATTEMPTS):
            with suppress(Timeout):
                self._resources.enter_context(FileLock(self._run.lock, blocking=False))
                return
            time.sleep(_PAUSE)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What keeps the record from being written is told once, and the run goes on."""
        try:
            yield
        except Exception as error:
            if not self._is_failing:
                why = error.strerror or str(error) if isinstance(error, OSError) else name_error(error)
                self._reporter.note("", f"no record of this run is kept in {str(self._run.path.parent)!r}: {why}")
            self._is_failing = True


def _describe_end(error: BaseException | None) -> tuple[str, int, str]:
    """How a run has ended, in a word, its exit code, and why."""
    if error is None:
        return DONE, 0, ""
    if is_interruption(error) or (has_interruption_come() and not getattr(error, "is_agreed", False)):
        return INTERRUPTED, _INTERRUPTED, ""
    where = getattr(error, "where", None)
    why = f"{where}: {first_line(error)}" if where and not first_line(error).startswith(where) else first_line(error)
    if isinstance(error, QualityError):
        return MISSED, error.exit_code, str(error)
    if isinstance(error, GradmapError):
        return FAILED, error.exit_code, why
    code = CapacityError.exit_code if find_shortage(error) is not None else StageError.exit_code
    return FAILED, code, f"{type(error).__name__}: {why}"


@contextmanager
def recording(plan: Plan, store: Store, machine: Machine, reporter: Reporter, *, is_wanted: bool) -> Iterator[Recorder | None]:
    """Keep the record of what runs inside; where it is not wanted, nothing."""
    if not is_wanted:
        yield None
        return
    recorder = Recorder(plan, store, machine, reporter)
    recorder.begin()
    try:
        yield recorder
    except BaseException as error:
        recorder.end(error)
        raise
    recorder.end()
