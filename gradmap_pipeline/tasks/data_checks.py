"""Whether a task's splits, data and fields are there, as far as its files tell before lm-eval reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data.columns import find_columns
from ..errors import StageError
from ..machine.file_kinds import describe_other
from .data_files import READERS, find_data
from .settings import Task, Value, plain, strings_in
from .templates import TEMPLATES, find_fields, find_template_fault

_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


def find_data_faults(task: Task, bases: Sequence[Path]) -> Iterator[str]:
    """Faults of data that lie on this machine, as files read by the reader that the task names."""
    reader = task.settings.get("dataset_path")
    options = task.settings.get("dataset_kwargs")
    named = (options.fields or {}).get("data_files") if options is not None else None
    if reader is None or reader.text not in READERS or named is None or "custom_dataset" in task.settings:
        return
    by_split: dict[str, Value] = named.fields if named.fields is not None else {"train": named}
    is_missing = False
    for value in by_split.values():
        for item in value.items if value.items is not None else [value]:
            for place in [] if item.text is None else find_data(item.text, bases):
                if not place.is_file() and not place.is_dir():
                    is_missing = True
                    yield f"{item.where}: {str(place)!r} is {describe_other(place) or 'not there'}, not a file"
            if item.text is not None and "://" not in item.text and not find_data(item.text, bases):
                is_missing = True
                beside = ", ".join(sorted({repr(str(base)) for base in bases}))
                looked = f"looked in the current folder, {str(Path.cwd())!r}, and beside the task, {beside}"
                yield f"{item.where}: no data {item.text!r}: {looked}"
    for name in _SPLITS:
        split = task.settings.get(name)
        if split is not None and not split.is_null and not split.is_code and split.node.value not in by_split:
            accepted = ", ".join(map(repr, by_split))
            yield f"{split.where}: {name} is {split.describe()}; accepted: {accepted}, as data_files ({named.where}) has them"
    is_plain = options is not None and (options.fields or {}).keys() == {"data_files"} and "process_docs" not in task.settings
    if not is_missing and is_plain:
        asked = task.settings.get("test_split") or task.settings.get("validation_split")
        rows = None if asked is None else by_split.get(str(asked.node.value))
        if rows is not None:
            names = [name for name in strings_in(plain(rows)) if "://" not in name]
            files = [file for name in names for file in find_data(name, bases)]
            yield from _find_field_faults(task, files)


def _find_field_faults(task: Task, files: Sequence[Path]) -> Iterator[str]:
    """Fields that templates take and rows do not have."""
    used: dict[str, tuple[str, Value]] = {}
    for name in TEMPLATES:
        value = task.settings.get(name)
        if value is None or value.text is None or find_template_fault(name, value) is not None:
            continue
        if name == "doc_to_decontamination_query":  # few tasks have it
            continue
        if name == "doc_to_choice" and value.text.isidentifier():  # a field by its name alone; as a template it says nothing
            used.setdefault(value.text, (name, value))
        for field in find_fields(value):
            used.setdefault(field, (name, value))
    known: dict[str, None] = {}
    for file in files if used else []:
        try:
            for columns in find_columns(file):
                known |= dict.fromkeys(columns)
                if used.keys() <= known.keys():
                    return
        except (StageError, OSError, ValueError):  # lm-eval's reader may know better
            return
    for field, (name, value) in used.items() if known else []:
        if field not in known:
            accepted = ", ".join(map(repr, list(known)[:20]))
            yield f"{value.where}: {name} is {value.describe()}, but no row has a field {field!r}; fields: {accepted}"
