"""Infinite numbers in config.json: JSON has no word for them, and programs do not agree on one.

Python writes `Infinity`, which no other JSON reader takes. transformers 5 writes `{"__float__": "Infinity"}`, which transformers 4
does not know (`PretrainedConfig.to_json_string` of both). Left out, the field has the default of its class, which is infinity for
the limits of a Mamba's time step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TAG = "__float__"
_TAGGED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def find_infinite(content: object, field: str = "") -> Iterator[tuple[str, float]]:
    """The dotted names of fields that are infinite or NaN, written in whichever way, and what they are."""
    if isinstance(content, dict):
        if set(content) == {_TAG} and content[_TAG] in _TAGGED:
            yield field, _TAGGED[content[_TAG]]
        for name, value in content.items():
            yield from find_infinite(value, f"{field}.{name}" if field else str(name))
    elif isinstance(content, list):
        for value in content:
            yield from find_infinite(value, field)
    elif isinstance(content, float) and not math.isfinite(content):
        yield field, content


def to_json(config: Mapping[str, Any], folder: Path) -> str:
    """The text of config.json, for every JSON reader.

    A field that holds an infinity is left out where the class of the config in `folder` gives the same without it, and written
    as transformers 5 does elsewhere.
    """
    config = dict(config)
    if any(find_infinite(config)):
        config = _leave_out(config, folder)
    return json.dumps(_tag(config), indent=2, allow_nan=False) + "\n"


def _leave_out(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    meant = _read(config, folder)
    for field, _ in list(find_infinite(config)):
        shorter = _without(config, field.split("."))
        if _read(shorter, folder) == meant:
            config = shorter
    return config


def _read(config: dict[str, Any], folder: Path) -> object:
    """All that the class of a config makes of it, but where it was read from."""
    from .pretrained import read_config

    read = read_config(folder, config)
    read.name_or_path = ""
    return json.loads(read.to_json_string(use_diff=False))


def _without(content: dict[str, Any], path: list[str]) -> dict[str, Any]:
    first, *rest = path
    if not rest or not isinstance(content.get(first), dict):
        return {name: value for name, value in content.items() if name != first}
    return {**content, first: _without(content[first], rest)}


def _tag(content: object) -> object:
    if isinstance(content, dict):
        return {name: _tag(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_tag(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return {_TAG: "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"}
    return content
