"""One YAML file of lm-eval tasks, read without running what it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..recipe.yaml_positions import MAX_DEPTH
from .data_files import READERS

MAX_BYTES = 4 << 20
"""Size of a file of tasks."""
_MAX_ITEMS = 10_000  # of one value; aliases count each time they are used
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "merge")}
_COLLECTIONS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:omap", "tag:yaml.org,2002:set"}


@dataclass(frozen=True)
class Entry:
    """One key of a mapping, at any depth."""

    key: str
    value: Any
    """Plain data; text for what has a tag of its own."""
    line: int
    path: tuple[str, ...]
    """The keys around it."""


@dataclass(frozen=True)
class TaskFile:
    """What a file says, key by key."""

    path: Path
    entries: tuple[Entry, ...]
    tags: tuple[tuple[int, str], ...]
    """Line and text of each value with a tag that is not plain YAML."""
    root: Any = None
    """The file as PyYAML's node; None: it is empty."""

    def includes(self) -> list[Path]:
        """Files that this one includes. Raises `ValueError` where one is not there."""
        files = []
        for entry in self.entries:
            if entry.key == "include" and not entry.path:
                for name in entry.value if isinstance(entry.value, list) else [entry.value]:
                    file = self.path.parent / str(name)
                    if not file.is_file():
                        raise ValueError(f"{self._where(entry.line)} includes {str(name)!r}, and there is no such file beside it")
                    files.append(file)
        return files

    def data_names(self) -> list[str]:
        """Files and folders that tasks name as their data; paths may be relative."""
        names: list[str] = []
        for entry in self.entries:
            if entry.key in ("data_files", "data_dir"):
                names += _texts(entry.value)
            elif entry.key == "dataset_path" and isinstance(entry.value, str) and entry.value not in READERS:
                names.append(entry.value)
        return names

    def find_code(self) -> Iterator[str]:
        """Places where Python would run, and what runs it."""
        for line, tag in self.tags:
            yield f"{self._where(line)}: {tag}"
        for entry in self.entries:
            value, where = entry.value, self._where(entry.line)
            if entry.key == "dataset_path" and isinstance(value, str) and self._is_script(value):
                yield f"{where}: dataset_path {value!r} is a loading script, or unpickles what it reads"
            elif entry.key == "trust_remote_code" and value is not False:
                yield f"{where}: trust_remote_code"
            elif entry.key == "hf_evaluate" and value is not False:
                yield f"{where}: hf_evaluate loads a metric's code"

    def _is_script(self, name: str) -> bool:
        if name.endswith(".py"):
            return True
        folders = [place for place in (Path(name), self.path.parent / name) if place.is_dir()]
        if any((folder / f"{folder.resolve().name}.py").is_file() for folder in folders):
            return True
        return not folders and "/" not in name and name in ("pandas", "webdataset", "cache")

    def _where(self, line: int) -> str:
        return f"{str(self.path)!r}, line {line}"


def read_task_file(path: Path) -> TaskFile:
    """Read a file of tasks. Raises `ValueError` where it is no YAML."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{str(path)!r} is not a file of tasks: it holds more than {MAX_BYTES >> 20} MiB")
    entries: list[Entry] = []
    tags: list[tuple[int, str]] = []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=loader):  # libyaml's composer crashes where its stack ends
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"{str(path)!r} holds values that are nested more than {MAX_DEPTH} deep")
        root = yaml.compose(text, Loader=loader)
        _collect(root, (), entries, tags, set())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    return TaskFile(path, tuple(entries), tuple(tags), root)


def _collect(node: Any, path: tuple[str, ...], entries: list[Entry], tags: list[tuple[int, str]], seen: set[int]) -> None:
    """All entries below a node, each node once, however many aliases lead to it."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    line = node.start_mark.line + 1
    if node.tag not in _SCALARS | _COLLECTIONS:
        tags.append((line, f"{node.tag} {node.value}"[:200] if isinstance(node, yaml.ScalarNode) else node.tag))
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            _collect(key_node, path, entries, tags, seen)
            entries.append(Entry(key, _plain(value_node, 0, [_MAX_ITEMS]), value_node.start_mark.line + 1, path))
            _collect(value_node, (*path, key), entries, tags, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _collect(item, path, entries, tags, seen)


def _plain(node: Any, depth: int, left: list[int]) -> Any:
    """Text, true or false, and lists and mappings of them, four deep: as much as names of files need. `left`: items to go."""
    left[0] -= 1
    if isinstance(node, yaml.ScalarNode):
        return node.value.lower() == "true" if node.tag.endswith(":bool") else node.value
    if depth == 4 or left[0] < 0:
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, depth + 1, left) for item in node.value if left[0] >= 0]
    return {getattr(key, "value", ""): _plain(value, depth + 1, left) for key, value in node.value if left[0] >= 0}


def _texts(value: Any) -> list[str]:
    """All texts in a value: `data_files` is a name, a list of names, or these by split."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in _texts(item)]
