"""Fields of a config that name one of a few things that transformers has, told without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_ACTIVATIONS = ("activations.py", "ACT2CLS", "ACT2FN")
_ROPE = ("modeling_rope_utils.py", "ROPE_INIT_FUNCTIONS", "ROPE_INIT_FUNCTIONS")
_TABLES = {
    "hidden_act": _ACTIVATIONS,
    "hidden_activation": _ACTIVATIONS,
    "activation_function": _ACTIVATIONS,
    "rope_type": _ROPE,
}
"""By field: the file of transformers and the table in it, and the name by which its users know that."""


@dataclass(frozen=True)
class UnknownName:
    """A value of a config that transformers has no such thing for."""

    field: str
    value: str
    accepted: tuple[str, ...]
    table: str

    def __str__(self) -> str:
        return f"{self.field!r} is {self.value!r}; accepted: {', '.join(self.accepted)} (transformers' {self.table})"


def find_unknown_name(config: Mapping[str, Any]) -> UnknownName | None:
    """The first field of a config whose value is in no table. An architecture may never look at it."""
    for path, field, value in _fields(config, ""):
        file, table, name = _TABLES[field]
        accepted = _read_table(file, table)
        if accepted and value not in accepted and not (field == "rope_type" and value == "default"):
            return UnknownName(path, value, ("default", *accepted) if field == "rope_type" else accepted, name)
    return None


def _fields(part: Mapping[str, Any], above: str) -> Iterator[tuple[str, str, str]]:
    """Path, field and value of each field that has a table. Configs of the text decoder and of positions lie inside."""
    for key, value in part.items():
        if key in _TABLES and isinstance(value, str):
            yield f"{above}{key}", key, value
        elif isinstance(value, dict) and (key == "text_config" or key.startswith("rope_") or "rope" in above):
            yield from _fields(value, f"{above}{key}.")


@cache
def _read_table(file: str, name: str) -> tuple[str, ...]:
    """The keys of a table in the source of transformers; none where it is written in another way."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    try:
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        is_named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if is_named and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return tuple(key.value for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
    return ()
