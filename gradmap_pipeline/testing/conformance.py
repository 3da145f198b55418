"""Find what breaks the contract of stages: a stage is run twice in fresh folders, and watched."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..artifacts import Artifact
from ..errors import GradmapError, PluginError, StageError, describe_value, name_error, on_one_line, text_of
from ..interruptions import is_interruption
from ..machine.atomic_folder import scratch_folder
from ..machine.digests import sha256_of
from ..recipe.asking import ask
from ..run.output_checks import dump_outputs, find_output_faults
from ..stages.forecasts import Forecasts
from ..stages.stage import Stage
from . import make_context
from .witness import Seen, watch

_TIMES = ("seconds", "saved")
"""Names of fields that are not compared: no two runs take equally long."""
_TOLERATED = 1.05
"""The peak may be this many times the memory given: the allocator returns pages late."""


def find_breaches(stage: Stage, inputs: Mapping[str, Artifact], seed: int, dtype: str, memory: int | None) -> list[str]:
    """Run a stage twice in fresh folders and return what breaks the contract, one line for each; see `testing.check_stage`."""
    try:
        taken = type(stage).Inputs.model_validate(inputs)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise GradmapError(f"input {'.'.join(map(str, detail['loc']))!r} of {stage.name!r}: {detail['msg']}") from error
    try:
        for method in ("writes", "output_types"):
            ask(method, stage, stage.name, "")
    except GradmapError as error:
        return [text_of(error)]
    findings: list[str] = list(_check_forecast(stage, inputs))
    contents = []
    with scratch_folder() as scratch:
        for attempt in (1, 2):
            run = _Run(stage, taken, scratch / str(attempt), seed, dtype, memory)
            findings += run.findings
            if run.content is None or attempt == 2:  # libraries make folders and caches when they are first used
                findings += _check_files(run.seen, stage, scratch / str(attempt))
            if run.content is None:
                break
            contents.append(run.content)
    if len(contents) == 2 and not stage.machine_bound:
        place = _find_difference(*contents)
        if place is not None:
            findings.append(
                f"the second run gives another output at {place}; take random numbers from a generator with context.seed"
            )
    return list(dict.fromkeys(findings))


class _Run:
    """One run of a stage, and what was found."""

    def __init__(self, stage: Stage, inputs: BaseModel, folder: Path, seed: int, dtype: str, memory: int | None) -> None:
        self.content: Any = None
        """JSON of all outputs; None where there are none."""
        context = make_context(folder, seed=seed, dtype=dtype, memory=memory)
        before, digests = _describe(inputs), _digest_files(inputs)
        result: Any = None
        failure: str | None = None
        with watch() as self.seen:
            try:
                result = stage.run(inputs, context)
            except BaseException as error:  # SystemExit too
                if is_interruption(error):
                    raise
                failure = _name_failure(stage, error)
        self.findings = list(_check_behaviour(self.seen))
        if memory is not None and self.seen.peak is not None and self.seen.peak > _TOLERATED * memory:
            self.findings.append(f"it takes {self.seen.peak / 2**20:,.0f} MiB where context.memory is {memory / 2**20:,.0f} MiB")
        self.findings += _check_inputs(inputs, before, digests)
        if failure is not None:
            self.findings.append(failure)
        elif not isinstance(result, stage.Outputs):
            self.findings.append(f"run() must return its Outputs, and returns {describe_value(result)}")
        else:
            self.findings += find_output_faults(result, inputs, folder, stage.writes())
            try:
                dump_outputs(result)
            except StageError as error:
                self.findings.append(text_of(error))
            else:
                outputs = {name: getattr(result, name) for name in type(result).model_fields}
                self.content = {name: value.content() for name, value in outputs.items() if isinstance(value, Artifact)}


def _check_forecast(stage: Stage, inputs: Mapping[str, Artifact]) -> Iterator[str]:
    """The plan asks before anything is known, and must get an answer or a refusal."""
    nothing_known = Forecasts(type(stage), **dict.fromkeys(type(stage).input_fields()))
    try:
        ask("forecast", stage, stage.name, "", nothing_known)
    except PluginError as error:
        if error.__cause__ is None:
            yield text_of(error)
        else:
            why = name_error(error.__cause__)
            yield f"forecast() fails where nothing is known of the inputs: {why}; take None for a field, or use known()"
    except GradmapError:
        return


def _check_files(seen: Seen, stage: Stage, folder: Path) -> Iterator[str]:
    for path in seen.left_outside((folder.resolve(), *(place.resolve() for place in stage.writes()))):
        yield f"it writes or removes {str(path)!r}; write to context.folder, or name the place in writes()"


def _check_behaviour(seen: Seen) -> Iterator[str]:
    if seen.printed:
        first = seen.printed.strip().splitlines()[0] if seen.printed.strip() else ""
        yield f"it prints to standard output ({first[:60]!r}); use context.note for what the user should know"
    for name in seen.threads:
        yield f"its thread {name!r} still runs after run() has returned; join it"
    for name in seen.process:
        yield f"it changes {name}, which other steps of the run share; put it back"


def _check_inputs(inputs: BaseModel, before: Any, digests: dict[Path, str]) -> Iterator[str]:
    place = _find_difference(before, _describe(inputs))
    if place is not None:
        yield f"it changes its inputs at {place}; make a copy with model_copy(update=...)"
    for path, digest in digests.items():
        if not path.is_file() or sha256_of(path) != digest:
            yield f"it changes {str(path)!r}, a file of its inputs; write to context.folder"


def _name_failure(stage: Stage, error: BaseException) -> str:
    """Where in the stage's own file it failed, where it did there."""
    own = getattr(sys.modules.get(type(stage).__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    place = f" at line {lines[-1]} of {Path(own).name}" if own and lines else ""
    return f"run() fails{place}: {_name_error(error)}"


def _name_error(error: BaseException) -> str:
    """Its message, after its type where it is none of ours."""
    return on_one_line(error) if isinstance(error, GradmapError) else f"{type(error).__name__}: {on_one_line(error)}"


def _describe(inputs: BaseModel) -> Any:
    """All that inputs hold, attributes that were put on them past their fields included."""
    return {
        name: {"fields": copy.deepcopy(value.model_dump()), "further": sorted(_further(value))}
        if isinstance(value, BaseModel)
        else value
        for name in type(inputs).model_fields
        for value in (getattr(inputs, name),)
    }


def _further(value: BaseModel) -> set[str]:
    return {name for name in vars(value) if name not in type(value).model_fields and not hasattr(type(value), name)}


def _digest_files(inputs: BaseModel) -> dict[Path, str]:
    artifacts = (getattr(inputs, name) for name in type(inputs).model_fields)
    return {path: sha256_of(path) for value in artifacts if isinstance(value, Artifact) for path in value.files_by_path()}


def _find_difference(one: Any, other: Any, place: str = "") -> str | None:
    """The first place at which two values differ: `model.layers.3`."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in (*one, *(key for key in other if key not in one)) if key not in _TIMES]
        pairs = [(str(key), one.get(key), other.get(key)) for key in keys]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = [(str(number), first, second) for number, (first, second) in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else repr(place)
    differences = (_find_difference(first, second, f"{place}.{key}" if place else key) for key, first, second in pairs)
    return next((difference for difference in differences if difference is not None), None)
