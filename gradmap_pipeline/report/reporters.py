"""Reports for a terminal, for a log, for a program, and none at all."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from typing import IO, TYPE_CHECKING, Any

from .. import __version__
from ..machine.streams import error_stream, is_lost
from ..run.events import Place, Progress, Reporter, RunFinished, RunStarted, StepFinished, StepStarted
from ..sweep.memory_plan import format_size
from ..text import dump_json, format_seconds, show
from .console import make_console, print_line, say
from .summary_tables import print_summary

if TYPE_CHECKING:
    from rich.progress import Progress as Bars, TaskID
    from rich.status import Status

_SCHEMA = 1
"""Of the JSON events. It rises where something is renamed, changed or left out, not where something comes."""
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_EVENTS = 0.5
_SECONDS_BEFORE_BAR = 1.0
_NOTES_ALIKE = 3
"""Notes of one step that begin alike, numbers apart, and are all shown."""


def make_reporter(
    *, json: bool = False, quiet: bool = False, verbose: bool = False, stream: IO[str] | None = None, has_tables: bool = True
) -> Reporter:
    """The reporter that fits the options and standard output.

    `stream`: gets the JSON. `verbose`: every note. `has_tables`: at the end of a run.
    """
    if json:
        return JsonReporter(stream or sys.stdout)
    if quiet:
        return QuietReporter()
    reporter = TerminalReporter(verbose) if sys.stdout.isatty() else LineReporter(verbose)
    reporter.has_tables = has_tables
    return reporter


class QuietReporter:
    """Says nothing but errors."""

    is_for_programs = False

    def run_started(self, event: RunStarted) -> None: ...
    def computing(self, event: Place) -> None: ...
    def step_started(self, event: StepStarted) -> None: ...
    def progress(self, event: Progress) -> None: ...
    def progress_ended(self, step: str, description: str) -> None: ...
    def note(self, step: str, text: str) -> None: ...
    def step_finished(self, event: StepFinished) -> None: ...
    def run_finished(self, event: RunFinished) -> None: ...
    def run_stopped(self, event: RunFinished) -> None: ...

    def error(self, exit_code: int, message: str, where: str | None) -> None:
        place = f"{where}: " if where and not message.startswith(where) else ""
        for line in filter(str.strip, message.split("\n")):
            print_line(f"error: {place}{line}", error_stream())


class JsonReporter(QuietReporter):
    """One JSON object a line."""

    is_for_programs = True

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._last_progress = 0.0

    def run_started(self, event: RunStarted) -> None:
        self._print({"event": "run_started", "schema": _SCHEMA, "version": __version__, **dataclasses.asdict(event)})

    def computing(self, event: Place) -> None:
        self._write("computing", event)

    def step_started(self, event: StepStarted) -> None:
        self._write("step_started", event)

    def progress(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self._last_progress >= _SECONDS_BETWEEN_EVENTS:
            self._last_progress = now
            self._write("progress", event)

    def note(self, step: str, text: str) -> None:
        self._print({"event": "note", "step": step, "text": text})

    def step_finished(self, event: StepFinished) -> None:
        self._write("step_finished", event)

    def run_finished(self, event: RunFinished) -> None:
        self._write("run_finished", event)

    def run_stopped(self, event: RunFinished) -> None:
        self._write("run_stopped", event)

    def error(self, exit_code: int, message: str, where: str | None) -> None:
        self._print({"event": "error", "exit_code": exit_code, "message": message, "where": where})
        if is_lost(self._stream):
            super().error(exit_code, message, where)

    def _write(self, name: str, event: Any) -> None:
        self._print({"event": name, **dataclasses.asdict(event)})

    def _print(self, value: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        print(dump_json({"event": value["event"], "time": now, **value}), file=self._stream, flush=True)


class LineReporter(QuietReporter):
    """Plain lines, for logs. Of many notes that say the same of one layer after another, some; `verbose`: all of them."""

    def __init__(self, verbose: bool = False) -> None:
        self.console = make_console()
        self._is_verbose = verbose
        self.has_tables = True
        """Whether tables end a run."""
        self._last_line = 0.0
        self._alike: Counter[str] = Counter()
        """How many notes of the step begin alike."""

    def computing(self, event: Place) -> None:
        self._say(describe_place(event))

    def step_started(self, event: StepStarted) -> None:
        self._last_line = time.monotonic()

    def progress(self, event: Progress) -> None:
        now = time.monotonic()
        if event.done and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = f", {format_seconds(event.seconds_left)} left" if event.seconds_left is not None else ""
            detail = f", {event.detail}" if event.detail else ""
            rate = f", {format_rate(event.rate, event.unit)}" if event.rate is not None else ""
            done = f"{event.done:,}/{event.total:,}{detail}{rate}{left}"
            self._say(f"{event.step}: {event.description} {done}")

    def note(self, step: str, text: str) -> None:
        beginning = re.sub(r"[0-9]+", "#", text.partition(":")[0])
        self._alike[beginning] += 1
        if self._is_verbose or "#" not in beginning or self._alike[beginning] <= _NOTES_ALIKE:
            self._say(f"  {text}")

    def step_finished(self, event: StepFinished) -> None:
        self._tell_folded()
        how = "from the store" if event.cached else format_seconds(event.seconds)
        self._say(f"{event.step}: done ({how})")

    def run_finished(self, event: RunFinished) -> None:
        if self.has_tables:
            print_summary(self.console, event.summary, event.seconds)

    def run_stopped(self, event: RunFinished) -> None:
        self.progress_ended("", "")
        self.run_finished(event)

    def error(self, exit_code: int, message: str, where: str | None) -> None:
        self._tell_folded()
        super().error(exit_code, message, where)

    def _tell_folded(self) -> None:
        """How many notes were not shown, and where they are."""
        folded = sum(count - _NOTES_ALIKE for beginning, count in self._alike.items() if "#" in beginning and count > _NOTES_ALIKE)
        if folded and not self._is_verbose:
            self._say(f"  and {folded} more of this kind; -v shows them, and gradmap.log in the store has them")
        self._alike.clear()

    def _say(self, text: str) -> None:
        say(self.console, text)


class CompareReporter(QuietReporter):
    """One line for each recipe of several."""

    def __init__(self, names: list[str]) -> None:
        self.console = make_console()
        self._names, self._number = names, 0

    def run_started(self, event: RunStarted) -> None:
        self._number += 1
        name = self._names[self._number - 1]
        say(self.console, f"{self._number}/{len(self._names)} {name}")

    def step_finished(self, event: StepFinished) -> None:
        if not event.cached:
            say(self.console, f"  {event.step}: done ({format_seconds(event.seconds)})")


class TerminalReporter(LineReporter):
    """Lines, with a bar for whatever takes longer than a second."""

    def __init__(self, verbose: bool = False) -> None:
        super().__init__(verbose)
        self._status: Status | None = None
        """Names the step from its start until it has a bar."""
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._since: float | None = None

    def step_started(self, event: StepStarted) -> None:
        super().step_started(event)
        self._start_status(event.step)

    def step_finished(self, event: StepFinished) -> None:
        self._stop_status()
        super().step_finished(event)

    def progress(self, event: Progress) -> None:
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if self._bars is None and now - self._since >= _SECONDS_BEFORE_BAR:
            self._start_bar(event)
        if self._bars is not None and self._task is not None:
            rate = show(format_rate(event.rate, event.unit)) if event.rate else ""
            self._bars.update(self._task, completed=event.done, rate=", ".join(filter(None, (rate, show(event.detail)))))

    def progress_ended(self, step: str, description: str) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._start_status(step)
        self._bars = self._task = self._since = None

    def run_finished(self, event: RunFinished) -> None:
        self._stop_status()
        super().run_finished(event)

    def error(self, exit_code: int, message: str, where: str | None) -> None:
        self.progress_ended("", "")
        self._stop_status()
        super().error(exit_code, message, where)

    def _start_status(self, step: str) -> None:
        from rich.text import Text

        self._stop_status()
        if step:
            self._status = self.console.status(Text(show(step)))
            self._status.start()

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
        self._status = None

    def _start_bar(self, event: Progress) -> None:
        self._stop_status()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        self._bars = Bars(*columns, console=self.console, transient=True)
        self._task = self._bars.add_task(show(f"{event.step}: {event.description}"), total=event.total, rate="")
        self._bars.start()


def describe_place(place: Place) -> str:
    """What a run starts from and where it computes, in one line."""
    threads = f"{place.threads} thread{'' if place.threads == 1 else 's'}"
    processes = f", {place.processes} processes" if place.processes > 1 else ""
    memory = f"{format_size(place.memory)} of memory{' each' if processes else ''}"
    return f"{place.model} on {place.device} in {place.dtype}, {threads}, {memory}{processes}; store {place.store}"


def format_rate(rate: float, unit: str) -> str:
    """Units a second, or, where one takes longer, the time that each takes: `0.4 layer/s` is `2.5 s a layer`."""
    if rate < 1:
        return f"{format_seconds(1 / rate)} a {unit}"
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s"
