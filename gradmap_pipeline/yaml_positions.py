"""YAML text to plain data, with the place of every value. Knows nothing about recipes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import Problem, RecipeError

Location = tuple[int | str, ...]

MAX_VALUES = 10_000
"""Values a document may expand to; aliases count each time they are used."""


@dataclass
class Document:
    """Plain data, and where each value stands."""

    source: str
    data: Any
    positions: dict[Location, tuple[int, int]] = field(default_factory=dict)
    """Line and column, from 1, of the value at each location; of the key, for entries of a mapping."""

    def where(self, location: Location) -> str:
        """`file:line:column` of a value, or of the innermost thing around it that is written."""
        while location and location not in self.positions:
            location = location[:-1]
        line, column = self.positions.get(location, (1, 1))
        return f"{self.source}:{line}:{column}"


_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core schema: only true and false are booleans, 1e-3 is a number, dates are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def load_yaml(text: str, source: str) -> Document:
    """Read one document. Raises `RecipeError` with the line and column of what cannot be read."""
    tabs = re.search(r"^ *\t", text, re.MULTILINE)
    if tabs:
        line = text.count("\n", 0, tabs.start()) + 1
        column = tabs.end() - tabs.start()
        raise _error(source, line, column, "a tab indents this line; YAML is indented with spaces")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        said = " ".join(filter(None, (error.context, error.problem)))
        raise _error(source, line, column, f"this is not valid YAML: {said}") from error
    except yaml.YAMLError as error:
        raise _error(source, 1, 1, f"this is not valid YAML: {error}") from error
    if node is None:
        raise _error(source, 1, 1, "the file is empty")
    document = Document(source, None)
    document.data = _Reader(document).read(node, ())
    return document


class _Reader:
    """Turn nodes into data, noting places."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.constructor = _Loader("")
        self.values = 0
        self.open: set[int] = set()

    def read(self, node: yaml.Node, location: Location) -> Any:
        self.document.positions.setdefault(location, _position(node))
        self.values += 1
        if self.values > MAX_VALUES:
            raise self._error(node, f"aliases expand this file to more than {MAX_VALUES} values")
        if node.tag not in _TAGS:
            raise self._error(node, f"tag {node.tag!r} is not allowed; a recipe holds plain values only")
        if id(node) in self.open:
            raise self._error(node, "an alias here stands for something that contains it")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._read_mapping(node, location)
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*location, number)) for number, item in enumerate(node.value)]
            return self._read_scalar(node)
        finally:
            self.open.discard(id(node))

    def _read_mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self._read_scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise self._error(key_node, f"a key must be text, found {getattr(key_node, 'value', key)!r}; put it in quotes")
            if key in mapping:
                raise self._error(key_node, f"key {key!r} is already given on line {lines[key]}; keep one of the two")
            lines[key] = key_node.start_mark.line + 1
            inside = (*location, key)
            self.document.positions[inside] = _position(key_node)
            mapping[key] = self.read(value_node, inside)
        return mapping

    def _read_scalar(self, node: yaml.Node) -> Any:
        try:
            if node.tag.endswith(":int"):
                return int(node.value, 0 if node.value.startswith(("0o", "0x")) else 10)
            return self.constructor.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self._error(node, f"cannot read {node.value!r} as {node.tag.rpartition(':')[2]}") from error

    def _error(self, node: yaml.Node, message: str) -> RecipeError:
        return _error(self.document.source, *_position(node), message)


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _error(source: str, line: int, column: int, message: str) -> RecipeError:
    return RecipeError([Problem(f"{source}:{line}:{column}", message)])
