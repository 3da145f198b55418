"""Fields of a config that name one of a few things that transformers has: what it has, where a name is none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_ACTIVATIONS = ("transformers.activations", "ACT2CLS", "ACT2FN")
_ROPE = ("transformers.modeling_rope_utils", "ROPE_INIT_FUNCTIONS", "ROPE_INIT_FUNCTIONS")
_TABLES = {
    "hidden_act": _ACTIVATIONS,
    "hidden_activation": _ACTIVATIONS,
    "activation_function": _ACTIVATIONS,
    "rope_type": _ROPE,
}
"""Maps a field to the module and the table that transformers looks its value up in, and to the name that users know."""


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
        module, table, name = _TABLES[field]
        accepted = tuple(getattr(import_module(module), table, ()))
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
