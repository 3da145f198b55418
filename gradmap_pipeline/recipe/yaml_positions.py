"""YAML text to plain data, with the place of every value. Knows nothing about recipes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import Problem, RecipeError

Location = tuple[int | str, ...]

MAX_VALUES = 10_000
"""Values a document may hold or expand to; aliases count each time they are used."""
MAX_DEPTH = 64
"""Lists and mappings that may stand inside each other."""
_MAX_BITS = 128  # of a whole number: beyond what any option takes, and still quick to print


@dataclass
class Document:
    """Plain data, and where each value stands."""

    source: str
    data: Any
    positions: dict[Location, tuple[int, int]] = field(default_factory=dict)
    """Line and column, from 1, of the value at each location; of the key, for entries of a mapping."""

    def where(self, location: Location) -> str:
        """`file:line:column` of a value, or of the innermost thing around it that is written."""
        line, column = self.position(location)
        return f"{self.source}:{line}:{column}"

    def position(self, location: Location) -> tuple[int, int]:
        """Line and column of the same."""
        while location and location not in self.positions:
            location = location[:-1]
        return self.positions.get(location, (1, 1))


_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _TooMuchError(Exception):
    """A document that is too deep or too long to be a recipe."""

    def __init__(self, mark: yaml.Mark, message: str) -> None:
        self.mark = mark
        super().__init__(message)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core schema: only true and false are booleans, 1e-3 is a number, dates are text."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one value; stop while the document is read, before it takes time or stack."""
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH:
            raise _TooMuchError(self.peek_event().start_mark, _TOO_DEEP)  # type: ignore[no-untyped-call]
        if self.nodes > 2 * MAX_VALUES:  # keys are nodes too
            raise _TooMuchError(self.peek_event().start_mark, f"holds more than {MAX_VALUES} values")  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TOO_DEEP = f"values are nested more than {MAX_DEPTH} deep"

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
    except _TooMuchError as error:
        raise _error(source, error.mark.line + 1, error.mark.column + 1, str(error)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise _error(source, line, column, f"the character U+{code:04X} is not allowed in YAML; remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        said = " ".join(filter(None, (error.context, error.problem)))
        raise _error(source, line, column, f"this is not valid YAML: {said}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML reads escapes such as "\U00110000" with chr()
        raise _error(source, 1, 1, f"this is not valid YAML: {' '.join(str(error).split())}") from error
    if node is None:
        raise _error(source, 1, 1, "no value is given" if source.startswith("--") else "the file is empty")
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
        self._count(node)
        if len(location) > MAX_DEPTH:
            raise self._error(node, _TOO_DEEP)
        if node.tag not in _TAGS:
            raise self._error(node, f"tag {_shorten(node.tag)} is not allowed; a recipe holds plain values only")
        self._enter(node)
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
        for key, (key_node, value_node) in self._collect(node).items():
            inside = (*location, key)
            self.document.positions[inside] = _position(key_node)
            mapping[key] = self.read(value_node, inside)
        return mapping

    def _collect(self, node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key and value nodes: those written in a mapping, then those that `<<` merges into it and that are not written there."""
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        lines: dict[str, int] = {}
        merged: list[yaml.MappingNode] = []
        for key_node, value_node in node.value:
            key = self._read_scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                shown = _shorten(key_node.value) if isinstance(key_node, yaml.ScalarNode) else f"a {key_node.id}"
                raise self._error(key_node, f"a key must be text, found {shown}; put it in quotes")
            if key in lines:
                raise self._error(key_node, f"key {_shorten(key)} is already given on line {lines[key]}; keep one of the two")
            lines[key] = key_node.start_mark.line + 1
            if key == "<<" and key_node.style is None:
                merged = self._find_merged(value_node)
            else:
                entries[key] = (key_node, value_node)
        for source in merged:
            self._count(source)
            self._enter(source)
            for key, pair in self._collect(source).items():
                entries.setdefault(key, pair)
            self.open.discard(id(source))
        return entries

    def _find_merged(self, node: yaml.Node) -> list[yaml.MappingNode]:
        """The mappings that `<<` names, one or a list of them; of two with the same key, the first counts."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                advice = "name one by its anchor, as in `<<: *name`, or several as a list"
                raise self._error(source, f"'<<' merges mappings, found {_describe(source)}; {advice}")
        return list(sources)

    def _count(self, node: yaml.Node) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise self._error(node, f"aliases expand this file to more than {MAX_VALUES} values")

    def _enter(self, node: yaml.Node) -> None:
        if id(node) in self.open:
            raise self._error(node, "an alias here stands for something that contains it")
        self.open.add(id(node))

    def _read_scalar(self, node: yaml.Node) -> Any:
        try:
            if node.tag.endswith(":int"):
                number = int(node.value, 0 if node.value.startswith(("0o", "0x")) else 10)
                if number.bit_length() > _MAX_BITS:
                    raise self._error(node, f"{_shorten(node.value)} is too large a number")
                return number
            value = self.constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise self._error(node, f"cannot read {_shorten(node.value)} as {node.tag.rpartition(':')[2]}") from error
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise self._error(node, 'half of a surrogate pair is not a character; write the character itself, or as "\\U0001F600"')
        return value

    def _error(self, node: yaml.Node, message: str) -> RecipeError:
        return _error(self.document.source, *_position(node), message)


def _describe(node: yaml.Node) -> str:
    return f"{_shorten(node.value)}" if isinstance(node, yaml.ScalarNode) else "a list"


def _shorten(text: str) -> str:
    """Text in quotes, cut short."""
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _error(source: str, line: int, column: int, message: str) -> RecipeError:
    return RecipeError([Problem(f"{source}:{line}:{column}", message)])
