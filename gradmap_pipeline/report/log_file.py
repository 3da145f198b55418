"""What a run tells, kept in a file as well: every note, with the time of day."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

from ..run.events import Place, Progress, Reporter, RunFinished, RunStarted, StepFinished, StepStarted
from ..text import format_seconds, show
from .reporters import describe_place


class LoggingReporter:
    """Another reporter, and a file beside it. A file that cannot be written stops no run; what it lacks the other has told."""

    def __init__(self, inner: Reporter, file: Path) -> None:
        self._inner, self._file = inner, file
        self._is_begun = False

    @property
    def is_for_programs(self) -> bool:
        return self._inner.is_for_programs

    def run_started(self, event: RunStarted) -> None:
        with suppress(OSError):
            if self._file.is_symlink() or (self._file.exists() and not self._file.is_file()):
                self._file.unlink()  # the store trusts nothing that it finds
            self._file.write_text("", encoding="utf-8")
            self._is_begun = True
        self._write(f"{event.recipe}: {', '.join(event.steps)}")
        self._inner.run_started(event)

    def computing(self, event: Place) -> None:
        self._write(describe_place(event))
        self._inner.computing(event)

    def step_started(self, event: StepStarted) -> None:
        self._write(f"{event.step}: started ({event.stage})")
        self._inner.step_started(event)

    def progress(self, event: Progress) -> None:
        self._inner.progress(event)

    def progress_ended(self, step: str, description: str) -> None:
        self._inner.progress_ended(step, description)

    def note(self, step: str, text: str) -> None:
        self._write(f"{step}: {text}")
        self._inner.note(step, text)

    def step_finished(self, event: StepFinished) -> None:
        self._write(f"{event.step}: done ({'from the store' if event.cached else format_seconds(event.seconds)})")
        self._inner.step_finished(event)

    def run_finished(self, event: RunFinished) -> None:
        self._write(f"finished in {format_seconds(event.seconds)}")
        self._inner.run_finished(event)

    def run_stopped(self, event: RunFinished) -> None:
        self._write(f"stopped after {format_seconds(event.seconds)}")
        self._inner.run_stopped(event)

    def error(self, exit_code: int, message: str, where: str | None) -> None:
        self._write(f"error {exit_code}: {f'{where}: ' if where else ''}{message}")
        self._inner.error(exit_code, message, where)

    def _write(self, text: str) -> None:
        if self._is_begun:
            with suppress(OSError), self._file.open("a", encoding="utf-8") as stream:
                stream.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {show(text)}\n")
