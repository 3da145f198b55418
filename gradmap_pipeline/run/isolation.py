"""Run a stage in another Python: artifacts travel as JSON and files, what it tells the user as it happens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .. import errors
from ..context import Advance, Context
from ..errors import GradmapError, OptionError, StageError
from ..machine.atomic_folder import scratch_folder
from ..machine.environment import Workplace, surroundings
from ..machine.memory import resident_bytes
from ..machine.processes import explain_end, tie
from ..recipe.plugin_files import folder_of
from ..stages.stage import Stage

_PATIENCE = 10
"""Seconds that a worker has to end when it is asked to."""
_PACKAGE = __name__.partition(".")[0]


class WorkerCrash(Exception):  # noqa: N818 - whatever the stage raised, told by its own name
    """An unexpected exception inside the worker."""

    def __init__(self, error_type: str, message: str, traceback: str) -> None:
        self.error_type, self.traceback = error_type, traceback
        super().__init__(message)


def run_elsewhere(
    stage: Stage, inputs: BaseModel, context: Context, workplace: Workplace, threads: int | None, log: Path
) -> BaseModel:
    """Do what `stage.run(inputs, context)` does, in the Python of `workplace`; what that prints goes to `log`.

    Raises what the stage raised, if that is a `GradmapError`, else `WorkerCrash`; `StageError` where the process died.
    """
    request = {
        "current_folder": str(Path.cwd()),
        "module": type(stage).__module__,
        "plugin_folder": None if (beside := folder_of(type(stage).__module__)) is None else str(beside),
        "class": type(stage).__name__,
        "stage": stage.name,
        "options": stage.model_dump(mode="json", by_alias=True),
        "inputs": inputs.model_dump(mode="json", serialize_as_any=True),
        "folder": str(context.folder),
        "seed": context.seed,
        "device": context.device,
        "dtype": context.dtype,
        "memory": max(0, context.memory - resident_bytes(context.device)),
        "host_memory": max(0, context.host_memory - resident_bytes()),
        "lineage": [vars(step) for step in context.lineage],
        "step": context.step,
        "metrics": [metric.model_dump() for metric in context.metrics],
        "provenance": context.provenance,
    }
    with scratch_folder() as folder, _start(folder, request, stage, workplace, threads, log) as process:
        final = _Relay(process, context).run()
        code = process.wait()
    if "outputs" in final:
        return stage.Outputs.model_validate(final["outputs"])
    if "error" in final:
        raise _make_error(**final["error"])
    if "crash" in final:
        raise WorkerCrash(**final["crash"])
    said = log.read_text(encoding="utf-8", errors="replace")
    raise explain_end("the process of the stage", code, said, f"; what it printed is in {str(log)!r}")


@contextmanager
def _start(
    folder: Path, request: dict[str, Any], stage: Stage, workplace: Workplace, threads: int | None, log: Path
) -> Iterator[subprocess.Popen[str]]:
    """A worker that imports this package and the plugin's from where they are, and all else from its own Python."""
    own = type(stage).__module__
    for name in (_PACKAGE, own.partition(".")[0])[: 1 if folder_of(own) else 2]:
        module = sys.modules[name]
        place = Path(next(iter(module.__path__))) if hasattr(module, "__path__") else Path(str(module.__file__))
        link = folder / (name if place.is_dir() else f"{name}.py")
        if not link.exists():
            link.symlink_to(place.resolve())
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    variables = surroundings()
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    command = [str(workplace.executable), "-m", f"{_PACKAGE}.run.worker", str(folder / "request.json")]
    with ExitStack() as stack:
        output = stack.enter_context(log.open("w"))
        process = subprocess.Popen(
            tie(command),
            cwd=folder,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            encoding="utf-8",
        )
        stack.callback(_end, process)
        yield process


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # it has died before it took what was written
                pipe.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Ended(Exception):  # noqa: N818 - carries the worker's last message through the calls it interrupts
    def __init__(self, message: dict[str, Any]) -> None:
        self.message = message
        super().__init__()


class _Relay:
    """Passes on what the worker tells, and answers what it asks."""

    def __init__(self, process: subprocess.Popen[str], context: Context) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._answers, self._messages, self._context = process.stdin, process.stdout, context
        self._shown: dict[int, tuple[ExitStack, Advance]] = {}

    def run(self) -> dict[str, Any]:
        """Until its last message; empty where it dies without one."""
        try:
            self._pump()
        except _Ended as end:
            return end.message
        finally:
            for stack, _ in self._shown.values():
                stack.close()
        raise AssertionError("a worker keeps only what it has requested")

    def _pump(self) -> Any:
        """Up to the next value that the worker has computed. Raises `_Ended` at its last message."""
        for text in self._messages:
            (message_type, value), *_ = json.loads(text).items()
            if message_type == "keep":
                return value
            if message_type == "note":
                self._context.note(value)
            elif message_type == "progress":
                number, *description = value
                stack = ExitStack()
                self._shown[number] = stack, stack.enter_context(self._context.progress(*description))
            elif message_type == "advance":
                number, units, detail = value
                self._shown[number][1](units, detail=detail)
            elif message_type == "progress_ended":
                self._shown.pop(value)[0].close()
            elif message_type == "recall":
                self._recall(value)
            else:
                raise _Ended({message_type: value})
        raise _Ended({})

    def _recall(self, key: Any) -> None:
        is_asked = False

        def compute() -> Any:
            nonlocal is_asked
            is_asked = True
            self._answer(None)
            return self._pump()

        kept = self._context.remember(key, compute)
        if not is_asked:
            self._answer(kept)

    def _answer(self, value: Any) -> None:
        with suppress(BrokenPipeError):  # that it has died is told by the end of its messages
            self._answers.write(json.dumps(value) + "\n")
            self._answers.flush()


def _make_error(error_type: str, message: str, option: str | None) -> GradmapError:
    if option is not None:
        return OptionError(option, message)
    cls = getattr(errors, error_type, StageError)
    return StageError(message) if cls is errors.RecipeError else cls(message)
