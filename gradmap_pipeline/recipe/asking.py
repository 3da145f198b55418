"""Ask a stage through one of its methods: what fails, or is not an answer, is told with the step, the plugin and the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import API_VERSION
from ..artifacts import Artifact
from ..cost.estimate import Estimate
from ..errors import CapacityError, GradmapError, NotKnownError, PluginError, describe_value
from ..interruptions import is_interruption
from ..machine.shortages import find_shortage
from ..machine.streams import plugin_code
from ..stages.forecasts import explain_wrong
from ..stages.stage import Stage
from .plugin_contract import explain_failure
from .validation import Invalid, validate


def _is_estimate(answer: Any) -> bool:
    if not isinstance(answer, Estimate):
        return answer is None
    numbers = (answer.peak_bytes, answer.bytes_read, answer.bytes_written, answer.flops, answer.seconds, answer.disk_bytes)
    return isinstance(answer.how, str) and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)


def _is_mapping_of_types(answer: Any) -> bool:
    return _is_named(answer) and all(isinstance(cls, type) and issubclass(cls, Artifact) for cls in answer.values())


def _is_named(answer: Any) -> bool:
    return isinstance(answer, Mapping) and all(isinstance(name, str) for name in answer)


def _is_named_mappings(answer: Any) -> bool:
    return _is_named(answer) and all(_is_named(options) for options in answer.values())


def _holds(cls: type) -> Callable[[Any], bool]:
    return lambda answer: isinstance(answer, list | tuple) and all(isinstance(item, cls) for item in answer)


_ACCEPTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "forecast": ("a mapping of output names", _is_named),
    "request": ("a mapping of input names to options", _is_named_mappings),
    "take_requests": ("a stage", lambda answer: isinstance(answer, Stage)),
    "inspect": ("nothing, and raise an OptionError or ModelError to refuse", lambda answer: answer is None),
    "advise": ("a list of texts", _holds(str)),
    "estimate": ("an Estimate or None", _is_estimate),
    "writes": ("a tuple of pathlib.Path", _holds(Path)),
    "output_types": ("a mapping of output names to classes of artifacts", _is_mapping_of_types),
}
"""By method: what it must return, in words and as a test."""


_NOT_KNOWN: dict[str, Any] = {"forecast": {}, "request": {}, "inspect": None, "advise": (), "estimate": None}
"""By method: its answer where it needs a value that the plan does not know."""


def ask(method: str, stage: Stage, step: str, plugin: str, *arguments: Any) -> Any:
    """What `stage.method(*arguments)` returns. Raises `PluginError` where that fails or is not an answer.

    Errors of ours, as stages raise them to refuse, pass as they are. A `NotKnownError` of a method that gets
    forecasts stands for the answer that nothing is known.
    """
    name = name_method(method, stage, plugin)
    wanted, is_accepted = _ACCEPTED[method]
    with _failures(name, step):
        try:
            answer = getattr(stage, method)(*arguments)
        except NotKnownError:
            if method not in _NOT_KNOWN:
                raise
            return _NOT_KNOWN[method]
        fault = None if is_accepted(answer) else f"{wanted}, got {describe_value(answer)}"
        if fault is None and method == "forecast":
            fault = explain_wrong(answer, ask("output_types", stage, step, plugin)) if answer else None
        if fault is None:
            return answer
    failure = PluginError(f"{name} must return {fault}")
    failure.where = f"step {step!r}"
    raise failure


def make_stage(cls: type[Stage], options: dict[str, Any], step: str, plugin: str) -> Stage:
    """The stage with these options. Raises `Invalid` where they do not fit, `PluginError` where its own checks fail."""
    with _failures(f"stage {cls.name!r} ({plugin}), asked to check its options,", step):
        return validate(cls, options)


@contextmanager
def _failures(name: str, step: str) -> Iterator[None]:
    """Code of a plugin runs in this block. What it raises is told with its name and the step; refusals pass as they are."""
    failure: GradmapError
    try:
        with plugin_code():
            yield
        return
    except (GradmapError, Invalid):
        raise
    except BaseException as error:  # SystemExit too: a plugin does not end the program
        if is_interruption(error):
            raise
        shortage = find_shortage(error)
        if shortage is None:
            failure = PluginError(f"{name} failed: {explain_failure(error, API_VERSION)}")
        else:
            failure = CapacityError(f"{name} {shortage.explain()}")
        failure.__cause__ = error
    failure.where = f"step {step!r}"
    raise failure


def name_method(method: str, stage: Stage, plugin: str) -> str:
    """`forecast() of stage 'prune' (gradmap_plugins.prune)`, for messages."""
    return f"{method}() of stage {stage.name!r}{f' ({plugin})' if plugin else ''}"
