"""What is wrong with tasks, told before anything runs: names, splits, data, templates. Nothing of a task is executed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from .configs import TaskFile
from .data_checks import find_data_faults
from .data_files import find_data
from .folder import TaskFolder
from .settings import Task, Value, plain, settings_of, strings_in
from .templates import TEMPLATES, find_template_fault

_STRUCTURE = {"task", "group", "tag", "task_list", "class", "include"}
_OF_GROUPS = {"group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata"}


@dataclass(frozen=True)
class Names:
    """What the lm-eval that is installed knows by name."""

    settings: Collection[str]
    output_types: Collection[str]
    metrics: Collection[str]
    aggregations: Collection[str]
    filters: Collection[str]


MAX_TRIED = 1 << 27
"""Bytes of data up to which a task is made before the run, only to see whether it can be."""


def find_faults(folder: TaskFolder, wanted: Sequence[str], *, allow_code: bool) -> Iterator[str]:
    """What is wrong with the tasks that are wanted, each with its file and line. Raises `ValueError` where YAML is none."""
    files = {file.path.resolve(): file for file in folder.task_files()}
    defined, faults = _find_tasks(folder, files)
    yield from faults
    yield from _find_misnamed(folder, set(wanted) - defined.keys())
    names = find_names()
    for task in _reach(wanted, defined):
        yield from _find_task_faults(task, names, allow_code=allow_code)
        yield from find_data_faults(task, folder.find_bases(files, [task.file.path.resolve()]))


def find_local_tasks(folder: TaskFolder, wanted: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Names and files of wanted tasks whose data lie on this machine, and are few enough to be read for a trial."""
    files = {file.path.resolve(): file for file in folder.task_files()}
    for task in _reach(wanted, _find_tasks(folder, files)[0]):
        options = task.settings.get("dataset_kwargs")
        path = task.settings.get("dataset_path")
        fields = (options.fields or {}) if options is not None else {}
        named = [name for key in ("data_files", "data_dir") if key in fields for name in strings_in(plain(fields[key]))]
        if path is None or path.text is None or any("://" in name for name in named):
            continue
        bases = folder.find_bases(files, [task.file.path.resolve()])
        places = [place for name in named or [path.text] for place in find_data(name, bases)]
        if places and sum(_size(place) for place in places) <= MAX_TRIED:
            yield task.name, task.file.path


def _find_tasks(folder: TaskFolder, files: Mapping[Path, TaskFile]) -> tuple[dict[str, Task], list[str]]:
    """Tasks and groups that a folder defines, and why some of its files define none."""
    own = set(folder.yaml_files())
    defined: dict[str, Task] = {}
    faults: list[str] = []
    for file in (file for file in files.values() if file.path in own):
        settings = settings_of(file, files)
        fault = _find_shape_fault(settings)
        if fault is not None:
            faults.append(fault)
            continue
        key = "group" if "group" in settings and "class" not in settings else "task"
        if key in settings and (name := settings[key].text) is not None:
            defined.setdefault(name, Task(name, file, settings))
    return defined, faults


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())


def find_names() -> Names | None:
    """Names that lm-eval has registered; None where it is not installed, or says it otherwise."""
    try:
        from dataclasses import fields
        from typing import get_args

        import lm_eval.api.metrics
        import lm_eval.filters  # noqa: F401 - both register what they have
        from lm_eval.api import instance, registry
        from lm_eval.config.task import TaskConfig

        return Names(
            {field.name for field in fields(TaskConfig)},
            get_args(instance.OutputType),
            set(registry.METRIC_REGISTRY),
            set(registry.AGGREGATION_REGISTRY),
            set(registry.FILTER_REGISTRY),
        )
    except (ImportError, AttributeError, TypeError):
        return None


def _find_shape_fault(settings: Mapping[str, Value]) -> str | None:
    """Why a file defines neither a task nor a group, though it looks like one."""
    if "class" in settings:
        return None
    for key in ("group", "task"):
        value = settings.get(key)
        if value is None or value.text is not None or (key == "task" and "group" in settings):
            continue
        advice = "; a list of tasks needs a name for them, as `group: NAME`" if key == "task" and value.items is not None else ""
        quotes = "; put quotes around it" if value.items is None and value.fields is None else ""
        return f"{value.where}: {key} is {value.describe()}; accepted: text, its name{quotes}{advice}"
    return None


def _find_misnamed(folder: TaskFolder, missing: Collection[str]) -> Iterator[str]:
    for file in folder.misnamed_files() if missing else []:
        fields = {} if file.root is None else Value(file.root, file.path).fields or {}
        for value in (fields.get("group"), fields.get("task")):
            if value is not None and value.text in missing:
                new = file.path.with_suffix(".yaml").name
                yield f"{value.where} defines {value.text!r}, but lm-eval reads *.yaml alone; rename the file to {new!r}"
                break


def _reach(wanted: Sequence[str], defined: Mapping[str, Task]) -> list[Task]:
    """The tasks that names stand for: themselves, members of groups, or all with a tag. Those that a group changes are left out."""
    waiting, tasks, seen = list(wanted), list[Task](), set[str]()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        task = defined.get(name)
        if task is None:
            waiting += [other.name for other in defined.values() if name in _texts(other.settings.get("tag"))]
        elif "class" in task.settings:
            continue
        elif "group" not in task.settings:
            tasks.append(task)
        elif task.settings.keys() <= _OF_GROUPS:
            waiting += _texts(task.settings.get("task"))
    return tasks


def _find_task_faults(task: Task, names: Names | None, *, allow_code: bool) -> Iterator[str]:
    settings = task.settings
    if names is not None:
        for key, value in settings.items():
            if key not in {*names.settings, *_STRUCTURE}:
                yield f"{value.where}: lm-eval's tasks have no setting {key!r}{_near(key, names.settings)}"
        output_type = settings.get("output_type")
        if output_type is not None and not output_type.is_code and output_type.text not in names.output_types:
            yield f"{output_type.where}: output_type is {output_type.describe()}; accepted: {', '.join(sorted(names.output_types))}"
        if not allow_code:  # code of a task may add to what lm-eval has
            yield from _find_metric_faults(settings, names)
            yield from _find_filter_faults(settings, names)
    asked = [settings[name] for name in ("test_split", "validation_split") if name in settings]
    if all(split.is_null for split in asked):
        yield f"{settings['task'].where}: task {task.name!r} has neither 'test_split' nor 'validation_split'; name the rows to ask"
    for name in TEMPLATES:
        template = settings.get(name)
        if template is not None and template.text is not None:
            fault = find_template_fault(name, template)
            if fault is not None:
                yield fault


def _find_metric_faults(settings: Mapping[str, Value], names: Names) -> Iterator[str]:
    for entry in _entries(settings, "metric_list"):
        fields = entry.fields or {}
        metric, aggregation = fields.get("metric"), fields.get("aggregation")
        if metric is None:
            yield f"{entry.where}: an entry of metric_list is {entry.describe()}; accepted: a mapping, as {{metric: acc}}"
        elif not metric.is_code and metric.text not in names.metrics and "process_results" not in settings:
            yield (
                f"{metric.where}: lm-eval has no metric {metric.describe()} of its own, and would load its code from elsewhere"
                f"{_near(metric.text, names.metrics)}; set `allow_code: true` if it may run"
            )
        if aggregation is not None and not aggregation.is_code and aggregation.text not in names.aggregations:
            accepted = ", ".join(sorted(names.aggregations))
            yield f"{aggregation.where}: lm-eval has no aggregation {aggregation.describe()}; accepted: {accepted}"


def _find_filter_faults(settings: Mapping[str, Value], names: Names) -> Iterator[str]:
    for entry in _entries(settings, "filter_list"):
        fields = entry.fields or {}
        steps = fields["filter"].items if "filter" in fields else None
        if "name" not in fields or steps is None:
            example = "{name: first, filter: [{function: take_first}]}"
            yield f"{entry.where}: an entry of filter_list is {entry.describe()}; accepted: a mapping, as {example}"
        for step in steps or []:
            function = (step.fields or {}).get("function")
            if function is None or (not function.is_code and function.text not in names.filters):
                wrong = step if function is None else function
                yield f"{wrong.where}: lm-eval has no filter {wrong.describe()}; accepted: {', '.join(sorted(names.filters))}"


def _entries(settings: Mapping[str, Value], name: str) -> Iterator[Value]:
    value = settings.get(name)
    yield from [] if value is None else value.items or []


def _texts(value: Value | None) -> list[str]:
    """A text, or those of a list; of its mappings, those that name a task and change nothing."""
    if value is None:
        return []
    if value.text is not None:
        return [value.text]
    texts = []
    for item in value.items or []:
        fields = item.fields or {}
        text = fields["task"].text if fields.keys() == {"task"} else item.text
        texts += [] if text is None else [text]
    return texts


def _near(name: str | None, accepted: Collection[str]) -> str:
    near = get_close_matches(name or "", accepted, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
