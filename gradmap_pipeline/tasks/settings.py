"""The settings of one task as lm-eval puts them together from its file and what that includes, each with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .configs import TaskFile, read_task_file

_CORE = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Value:
    """A value in a file of tasks."""

    node: yaml.Node
    file: Path

    @property
    def where(self) -> str:
        return f"{str(self.file)!r}, line {self.node.start_mark.line + 1}"

    @property
    def text(self) -> str | None:
        """What it says, where it is text."""
        return self.node.value if isinstance(self.node, yaml.ScalarNode) and self.node.tag == f"{_CORE}str" else None

    @property
    def is_null(self) -> bool:
        return self.node.tag == f"{_CORE}null"

    @property
    def is_code(self) -> bool:
        """Whether it stands for what Python gives."""
        return not self.node.tag.startswith(_CORE) or self.node.tag.startswith(f"{_CORE}python")

    @property
    def items(self) -> list[Value] | None:
        """The values of a list."""
        return [Value(item, self.file) for item in self.node.value] if isinstance(self.node, yaml.SequenceNode) else None

    @property
    def fields(self) -> dict[str, Value] | None:
        """The values of a mapping."""
        if not isinstance(self.node, yaml.MappingNode):
            return None
        return {getattr(key, "value", ""): Value(value, self.file) for key, value in _pairs(self.node, 0)}

    def describe(self) -> str:
        """The text as it is written, cut short."""
        if isinstance(self.node, yaml.ScalarNode):
            said = repr(self.node.value) if self.text is not None else self.node.value or "nothing"
            return said if len(said) <= 60 else f"{said[:57]}..."
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "a mapping"


@dataclass(frozen=True)
class Task:
    """One task of a folder, its files put together."""

    name: str
    file: TaskFile
    settings: dict[str, Value]


def _pairs(node: yaml.MappingNode, depth: int) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Keys and values; those that `<<` brings in come first, so that own ones replace them."""
    for key, value in node.value:
        if key.tag == f"{_CORE}merge" and depth < 8:
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(merged, yaml.MappingNode):
                    yield from _pairs(merged, depth + 1)
    yield from ((key, value) for key, value in node.value if key.tag != f"{_CORE}merge")


def settings_of(file: TaskFile, files: Mapping[Path, TaskFile], seen: set[Path] | None = None) -> dict[str, Value]:
    """Settings by name: those of included files, in their order, then the file's own.

    `files`: those known, by their resolved paths. Raises `ValueError` where a file is included twice, as lm-eval does.
    """
    seen = set() if seen is None else seen
    seen.add(file.path.resolve())
    own = {} if file.root is None else Value(file.root, file.path).fields or {}
    settings: dict[str, Value] = {}
    for include in file.includes():
        place = include.resolve()
        if place in seen:
            fault = "itself" if place == file.path.resolve() else f"{include.name!r}, which is included already"
            raise ValueError(f"{own['include'].where} includes {fault}; lm-eval takes each file once, so take this `include` out")
        settings |= settings_of(files.get(place) or read_task_file(include), files, seen)
        settings.pop("task_list", None)
    own.pop("include", None)
    return settings | own


def plain(value: Value, depth: int = 0) -> Any:
    """Texts, and lists and mappings of them."""
    if depth > 4:
        return None
    if value.items is not None:
        return [plain(item, depth + 1) for item in value.items]
    if value.fields is not None:
        return {name: plain(item, depth + 1) for name, item in value.fields.items()}
    return value.text


def strings_in(value: Any) -> list[str]:
    """All texts in a value."""
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in strings_in(item)]
    return [value] if isinstance(value, str) else []
