"""Check plain data against pydantic models, and say what is wrong in plain sentences."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, RootModel, ValidationError
from pydantic.fields import FieldInfo

from .yaml_positions import Location

M = TypeVar("M", bound=BaseModel)

LARGEST_INTEGER = 2**63 - 1
"""Largest whole number in a recipe: what torch takes for a seed, and a tensor for a size."""

_BOUNDS = ("gt", "ge", "lt", "le")
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
    """Make a model from plain data. Nothing is converted: "128" is not a number, and 1 is not true.

    Paths are the exception: `~` at their start becomes the home folder. Numbers must be finite.
    """
    complaints: list[tuple[Location, str]] = []
    prepared = _prepare(data, model, (), complaints)
    try:
        made = model.model_validate_json(json.dumps(prepared), strict=True)
    except ValidationError as error:
        places = [place for place, _ in complaints]
        # What a validator says of a whole whose part is refused already adds nothing.
        complaints += [(at, said) for at, said in _explain_all(error, model) if not any(at == place[: len(at)] for place in places)]
    except OSError as error:  # from a validator that looks at a file
        complaints = complaints or [((), f"{error.strerror}: {str(error.filename)!r}")]
    if complaints:
        raise Invalid(complaints) from None
    return made


def _prepare(value: Any, annotation: Any, location: Location, complaints: list[tuple[Location, str]]) -> Any:
    """The value with `~` expanded where it is a path. Notes paths and numbers that nothing can work with."""
    members = _members(annotation)
    if Any in members or not members:
        return value
    if isinstance(value, float) and not math.isfinite(value):
        complaints.append((location, f"found {_show(value)}, accepted: a finite number"))
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        sign, side = ("-", "least") if value < 0 else ("", "most")
        complaints.append((location, f"found {_show(value)}, accepted: at {side} {sign}{LARGEST_INTEGER}"))
    elif isinstance(value, str) and Path in members:
        value = os.path.expanduser(value)
        fault = _find_fault(value)
        if fault is not None:
            complaints.append((location, fault))
    elif isinstance(value, list):
        items = [argument for member in members if get_origin(member) in (list, tuple) for argument in get_args(member)]
        return [_prepare(item, _union(items), (*location, number), complaints) for number, item in enumerate(value)]
    elif isinstance(value, dict):
        fields = _fields_of(annotation) or {}
        others = [get_args(member)[1] for member in members if get_origin(member) is dict]
        return {key: _prepare(item, fields.get(key, _union(others)), (*location, key), complaints) for key, item in value.items()}
    return value


def _find_fault(path: str) -> str | None:
    """Why no file can have this path."""
    if not path:
        return "found '', accepted: a path"
    if "\0" in path:
        return f"found {_show(path)}; a path cannot hold a NUL character"
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            said = "it cannot be encoded" if isinstance(error, ValueError) else error.strerror
            return f"found {_show(path)}; this system has no such paths ({said})"
    return None


def _members(annotation: Any) -> list[Any]:
    """The types that a union is made of; what a root model holds stands for it."""
    if isinstance(annotation, tuple):
        return [inner for member in annotation for inner in _members(member)]
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        return _members(annotation.model_fields["root"].annotation)
    if get_origin(annotation) in (list, tuple, dict) or not get_args(annotation) or isinstance(annotation, type):
        return [annotation]
    return [inner for member in get_args(annotation) for inner in _members(member)]


def _union(annotations: list[Any]) -> Any:
    return tuple(annotations)


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
    error_type, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if error_type == "model_type" and isinstance(value, str):
        return f"found {_show(value)}, accepted: a mapping{_advise_mapping(value, model, location)}"
    if error_type == "extra_forbidden":
        accepted = _accepted_keys(model, location[:-1])
        return f"unknown key {str(location[-1])!r}; {suggest(str(location[-1]), accepted)}"
    if error_type == "missing":
        return f"{str(location[-1])!r} is missing"
    if error_type == "literal_error":
        accepted = [word.strip().strip("'") for word in context["expected"].replace(" or ", ", ").split(",")]
        near = get_close_matches(value, accepted, n=1) if isinstance(value, str) else []
        hint = f"; did you mean {near[0]!r}?" if near and len(accepted) > 1 else ""
        return f"found {_show(value)}, accepted: {', '.join(accepted)}{hint}"
    if error_type == "value_error":
        return str(context["error"])
    if error_type in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        span = _describe_span(model, location)
        if span is not None:
            return f"found {_show(value)}, accepted: {span}"
        limit = next(iter(context.values()))
        words = {
            "greater_than": "more than",
            "greater_than_equal": "at least",
            "less_than": "less than",
            "less_than_equal": "at most",
        }
        return f"found {_show(value)}, accepted: {words[error_type]} {limit}"
    if error_type == "string_pattern_mismatch":
        return f"found {_show(value)}, accepted: letters, digits, '-' and '_', starting with a letter"
    if error_type == "string_too_short":
        return f"found {_show(value)}, accepted: text that is not empty"
    if error_type == "too_short":
        return "found an empty list; give at least one entry"
    wanted = next((words for prefix, words in _KINDS.items() if error_type.startswith(prefix)), None)
    if wanted in ("a number", "a whole number"):
        wanted = _describe_span(model, location) or wanted
    if wanted is None:
        return f"found {_show(value)}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
    quotes = "; put quotes around it" if wanted in ("text", "a path") and isinstance(value, int | float) and not is_branch else ""
    return f"found {_show(value)}, accepted: {wanted}{quotes}"


def _describe_span(model: type[BaseModel], location: Location) -> str | None:
    """What numbers a field with both bounds takes, with an example; None of any other."""
    info = _field_at(model, location)
    bounds = {name: getattr(rule, name) for rule in (info.metadata if info else ()) for name in _BOUNDS if hasattr(rule, name)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if info is None or low is None or high is None or high >= LARGEST_INTEGER:
        return None
    is_whole = float not in _members(info.annotation)
    kind = "a whole number" if is_whole else "a number"
    if "ge" in bounds and "le" in bounds:
        return f"{kind} from {low} to {high}" + ("" if is_whole else f", such as {_halve(low, high)}")
    lower = f"at least {low}" if "ge" in bounds else f"above {low}"
    upper = f"at most {high}" if "le" in bounds else f"below {high}"
    default = info.default
    example = default if isinstance(default, int | float) and low < default < high else _halve(low, _halve(low, high))
    return f"{kind} {lower} and {upper}" + ("" if is_whole else f", such as {example}")


def _halve(low: float, high: float) -> float:
    return (low + high) / 2


def _advise_mapping(text: str, model: type[BaseModel], location: Location) -> str:
    """How to write, as a mapping, the one word that stands for a model or a data set."""
    fields = _fields_of(_annotation_at(model, location)) or {}
    key = next((str(part) for part in reversed(location) if isinstance(part, str)), "")
    if text in _members(fields.get("builtin")):
        name = "builtin"
    elif "path" in fields and os.path.exists(os.path.expanduser(text)):
        name = "path"
    elif "id" in fields and re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        name = "id"
    else:
        return ""
    return f"; write `{key}: {{{name}: {text if re.fullmatch(r'[A-Za-z][A-Za-z0-9./_-]*', text) else json.dumps(text)}}}`"


def _without_branches(raw: tuple[int | str, ...], model: type[BaseModel]) -> tuple[Location, bool]:
    """Drop the union members that pydantic puts into locations: only keys and indices are written in a recipe."""
    location: list[int | str] = []
    current: Any = model
    for part in raw:
        if isinstance(part, int):
            location.append(part)
            continue
        values, fields = _values_of(current), _fields_of(current)
        if values is not None:
            location.append(part)
            current = values
        elif fields is None:
            return tuple(location), True
        elif part in fields or len(location) + 1 == len(raw):
            location.append(part)
            current = fields.get(part)
    return tuple(location), len(location) < len(raw)


def _values_of(annotation: Any) -> Any:
    """The annotation of the values of a mapping whose keys are free; None of anything else."""
    members = [member for member in _members(annotation) if member is not type(None)]
    return get_args(members[0])[1] if len(members) == 1 and get_origin(members[0]) is dict else None


def _fields_of(annotation: Any) -> dict[str, Any] | None:
    """Keys and annotations of the model inside an annotation; None where there is no model in it."""
    infos = _infos_of(annotation)
    return None if infos is None else {name: info.annotation for name, info in infos.items()}


def _annotation_at(model: type[BaseModel], location: Location) -> Any:
    annotation: Any = model
    for part in location:
        if isinstance(part, str):
            annotation = _values_of(annotation) or (_fields_of(annotation) or {}).get(part)
    return annotation


def _field_at(model: type[BaseModel], location: Location) -> FieldInfo | None:
    """The field at a location; None where an entry of a list or of a mapping stands there."""
    if not location or not isinstance(location[-1], str):
        return None
    return (_infos_of(_annotation_at(model, location[:-1])) or {}).get(location[-1])


def _infos_of(annotation: Any) -> dict[str, FieldInfo] | None:
    """Keys and fields of the model inside an annotation; None where there is no model in it."""
    if get_origin(annotation) is dict:
        return None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and not issubclass(annotation, RootModel):
        return {info.alias or name: info for name, info in annotation.model_fields.items()}
    inner = map(_infos_of, annotation if isinstance(annotation, tuple) else get_args(annotation))
    return next((infos for infos in inner if infos is not None), None)


def _accepted_keys(model: type[BaseModel], location: Location) -> list[str]:
    return list(_fields_of(_annotation_at(model, location)) or {})


def _join(sentences: list[str]) -> str:
    if len(sentences) == 1:
        return sentences[0]
    heads = {sentence.partition(", accepted: ")[0] for sentence in sentences}
    if len(heads) == 1 and all(", accepted: " in sentence for sentence in sentences):
        return f"{heads.pop()}, accepted: {' or '.join(sentence.partition(', accepted: ')[2] for sentence in sentences)}"
    return "; ".join(sentences)


def _show(value: Any) -> str:
    """A value as YAML writes it, cut short."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
