"""The other side of `isolation`: runs one stage in this Python, and talks in JSON lines over standard input and output.

`python -m gradmap_pipeline.run.worker REQUEST`; the folder it is started in holds the packages to import.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel

from ..context import Advance, Context, FinishedStep
from ..errors import CapacityError, GradmapError, OptionError, describe_value, text_of
from ..interruptions import is_interruption, note_interruption
from ..machine.shortages import find_shortage
from ..metrics import Metric
from ..recipe.plugin_files import open_folder
from ..stages.stage import Stage


class ParentChannel:
    """Messages to the process that started this one, and its answers."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print goes to the log
        self._answers: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, **message: Any) -> None:
        """Send one message."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def ask(self, **message: Any) -> Any:
        """Send one message and wait for the answer."""
        self.tell(**message)
        return self._answers.get()

    def _listen(self) -> None:
        for line in os.fdopen(os.dup(0), encoding="utf-8"):  # not sys.stdin, whose lock Python needs when it ends
            self._answers.put(json.loads(line))
        os._exit(1)  # the process that started this one is gone


def make_worker_context(request: dict[str, Any], line: ParentChannel) -> Context:
    """What the stage may use; all that reaches the user goes through `line`."""

    numbers = itertools.count()

    @contextmanager
    def progress(description: str, total: int, unit: str) -> Iterator[Advance]:
        number = next(numbers)
        line.tell(progress=[number, description, total, unit])

        def advance(units: int = 1, /, *, detail: str = "") -> None:
            line.tell(advance=[number, units, detail])

        try:
            yield advance
        finally:
            line.tell(progress_ended=number)

    def remember(key: Any, compute: Callable[[], Any]) -> Any:
        value = line.ask(recall=key)
        if value is None:
            value = compute()
            line.tell(keep=value)
        return value

    return Context(
        folder=Path(request["folder"]),
        seed=request["seed"],
        device=request["device"],
        dtype=request["dtype"],
        memory=request["memory"],
        host_memory=request["host_memory"],
        progress=progress,
        note=lambda text: line.tell(note=text),
        remember=remember,
        lineage=tuple(FinishedStep(**step) for step in request["lineage"]),
        step=request["step"],
        metrics=tuple(Metric.model_validate(metric) for metric in request["metrics"]),
        provenance=request["provenance"],
    )


def work(request: dict[str, Any], line: ParentChannel) -> None:
    """Run the stage, and send what it gives or what went wrong."""
    try:
        if request["plugin_folder"] is not None:
            open_folder(Path(request["plugin_folder"]))
        stage_class: type[Stage] = getattr(importlib.import_module(request["module"]), request["class"])
        stage = stage_class.model_validate(request["options"])
        inputs = stage.Inputs.model_validate(request["inputs"])
        result = stage.run(inputs, make_worker_context(request, line))
        if not isinstance(result, BaseModel) or not isinstance(result, stage.Outputs):
            raise TypeError(f"it must return its Outputs, got {describe_value(result)}")
    except BaseException as error:
        if is_interruption(error):
            raise
        shortage = None if isinstance(error, CapacityError) else find_shortage(error)
        if shortage is not None:
            message = f"stage {request['stage']!r} {shortage.explain([Path(request['folder'])])}"
            line.tell(error={"error_type": CapacityError.__name__, "message": message, "option": None})
        elif isinstance(error, GradmapError):
            option = error.option if isinstance(error, OptionError) else None
            line.tell(error={"error_type": type(error).__name__, "message": text_of(error), "option": option})
        else:
            line.tell(crash={"error_type": type(error).__name__, "message": text_of(error), "traceback": traceback.format_exc()})
    else:
        line.tell(outputs=result.model_dump(mode="json"))


def _interrupt(number: int, frame: FrameType | None) -> None:
    note_interruption()
    raise KeyboardInterrupt


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.chdir(request["current_folder"])
    try:
        work(request, ParentChannel())
    except KeyboardInterrupt:  # ends as by the signal, which says why
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
