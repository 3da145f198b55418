"""Check plain data against pydantic models, and say what is wrong in plain sentences."""

from __future__ import annotations

import json
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from .yaml_positions import Location

M = TypeVar("M", bound=BaseModel)

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "path": "a path",
    "none": "null",
}


class Invalid(Exception):  # noqa: N818 - carries complaints; the caller raises the error a user meets
    """Data that does not fit: complaints by location inside it."""

    def __init__(self, complaints: list[tuple[Location, str]]) -> None:
        self.complaints = complaints
        super().__init__(complaints)


def validate(model: type[M], data: Any) -> M:
    """Make a model from plain data. Nothing is converted: "128" is no number, and 1 is not true."""
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise Invalid(_explain_all(error, model)) from None


def suggest(name: str, accepted: Collection[str]) -> str:
    """`did you mean …?` when something is near, else the list."""
    near = get_close_matches(name, accepted, n=1)
    return f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(sorted(accepted)) or 'none'}"


def _explain_all(error: ValidationError, model: type[BaseModel]) -> list[tuple[Location, str]]:
    """One complaint a location: the branches of a union are joined into one sentence."""
    places: dict[Location, list[str]] = {}
    for detail in error.errors(include_url=False):
        location, is_branch = _without_branches(detail["loc"], model)
        sentences = places.setdefault(location, [])
        sentence = _explain(dict(detail), model, location, is_branch)
        if sentence not in sentences:
            sentences.append(sentence)
    return [(location, _join(sentences)) for location, sentences in places.items()]


def _explain(detail: dict[str, Any], model: type[BaseModel], location: Location, is_branch: bool) -> str:
    kind, found, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "extra_forbidden":
        accepted = _accepted_keys(model, location[:-1])
        return f"unknown key {str(location[-1])!r}; {suggest(str(location[-1]), accepted)}"
    if kind == "missing":
        return f"{str(location[-1])!r} is missing"
    if kind == "literal_error":
        accepted = [word.strip().strip("'") for word in context["expected"].replace(" or ", ", ").split(",")]
        near = get_close_matches(found, accepted, n=1) if isinstance(found, str) else []
        hint = f"; did you mean {near[0]!r}?" if near and len(accepted) > 1 else ""
        return f"found {_show(found)}, accepted: {', '.join(accepted)}{hint}"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        limit = next(iter(context.values()))
        words = {
            "greater_than": "more than",
            "greater_than_equal": "at least",
            "less_than": "less than",
            "less_than_equal": "at most",
        }
        return f"found {_show(found)}, accepted: {words[kind]} {limit}"
    if kind == "string_pattern_mismatch":
        return f"found {_show(found)}, accepted: letters, digits, '-' and '_', starting with a letter"
    if kind == "too_short":
        return "found an empty list; give at least one entry"
    wanted = next((words for prefix, words in _KINDS.items() if kind.startswith(prefix)), None)
    if wanted is None:
        return f"found {_show(found)}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
    quotes = "; put quotes around it" if wanted in ("text", "a path") and isinstance(found, int | float) and not is_branch else ""
    return f"found {_show(found)}, accepted: {wanted}{quotes}"


def _without_branches(raw: tuple[int | str, ...], model: type[BaseModel]) -> tuple[Location, bool]:
    """Drop the union members that pydantic puts into locations: only keys and indices are written in a recipe."""
    location: list[int | str] = []
    current: Any = model
    for part in raw:
        if isinstance(part, int):
            location.append(part)
            continue
        fields = _fields_of(current)
        if part in fields or (fields and len(location) + 1 == len(raw)):
            location.append(part)
            current = fields.get(part)
        elif not fields:
            return tuple(location), True
    return tuple(location), len(location) < len(raw)


def _fields_of(annotation: Any) -> dict[str, Any]:
    """Keys and annotations of the model inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {info.alias or name: info.annotation for name, info in annotation.model_fields.items()}
    for member in get_args(annotation):
        if fields := _fields_of(member):
            return fields
    return {}


def _accepted_keys(model: type[BaseModel], location: Location) -> list[str]:
    fields = _fields_of(model)
    for part in location:
        if isinstance(part, str):
            fields = _fields_of(fields.get(part))
    return list(fields)


def _join(sentences: list[str]) -> str:
    if len(sentences) == 1:
        return sentences[0]
    heads = {sentence.partition(", accepted: ")[0] for sentence in sentences}
    if len(heads) == 1 and all(", accepted: " in sentence for sentence in sentences):
        return f"{heads.pop()}, accepted: {' or '.join(sentence.partition(', accepted: ')[2] for sentence in sentences)}"
    return "; ".join(sentences)


def _show(value: Any) -> str:
    """A value as YAML writes it, cut short."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
