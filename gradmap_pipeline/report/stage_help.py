"""Describe stages from their classes: for the terminal, and for the reference in the docs."""

from __future__ import annotations

import inspect
import sys
from typing import IO, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ..artifacts import Artifact
from ..errors import PluginError
from ..recipe.catalog import Catalog
from ..recipe.plugin_files import show_module
from ..recipe.schema import make_options_schema
from ..stages.stage import Stage, name_types
from ..text import dump_json, show, show_lines


def list_stages(catalog: Catalog) -> str:
    """One line a stage, then where they come from, and the plugins that are left out, and why."""
    width = max((len(name) for name in catalog.stages), default=0)
    lines = [f"{name:<{width}}  {_summarise(stage)}" for name, stage in catalog.stages.items()]
    foreign = {plugin for plugin in catalog.plugin_of.values() if not plugin.startswith("gradmap_plugins.")}
    for plugin in sorted(foreign):
        names = [name for name, owner in catalog.plugin_of.items() if owner == plugin]
        lines.append(f"{', '.join(names)}: from plugin {_name_plugin(catalog, names[0])}")
    ours = next((name for name, owner in catalog.plugin_of.items() if owner not in foreign), None)
    if ours is not None:
        lines.append(f"{'all others' if foreign else 'all'}: from {_name_origin(catalog, ours)}")
    lines += [f"left out: plugin {plugin}: {reason}" for plugin, reason in catalog.broken.items()]
    return "\n".join(map(show, lines))


def _name_plugin(catalog: Catalog, name: str) -> str:
    """The plugin of a stage, with the distribution that installs it."""
    origin = _name_origin(catalog, name)
    return catalog.plugin_of[name] + (f", {origin}" if origin else "")


def _name_origin(catalog: Catalog, name: str) -> str:
    origin = catalog.origin_of[name]
    return "" if origin is None else f"{origin.name} {origin.version}"


def print_json(catalog: Catalog, name: str | None, stream: IO[str]) -> None:
    """All that is known of one stage, or of all, as one JSON list; on standard error, the plugins that are left out."""
    names = list(catalog.stages) if name is None else [_find(catalog, name)]
    print(dump_json([_as_data(catalog, name) for name in names], indent=2), file=stream, flush=True)
    for plugin, reason in catalog.broken.items():
        print(show(f"left out: plugin {plugin}: {reason}"), file=sys.stderr)


def _find(catalog: Catalog, name: str) -> str:
    stage = catalog.find(name)
    if stage is None:
        raise PluginError(catalog.explain_unknown(name))
    return stage.name


def _as_data(catalog: Catalog, name: str) -> dict[str, Any]:
    stage, origin = catalog.stages[name], catalog.origin_of[name]
    return {
        "name": name,
        "summary": _first_line(stage),
        "distribution": None if origin is None else origin.name,
        "version": None if origin is None else origin.version,
        "module": show_module(stage.__module__),
        "plugin": catalog.plugin_of[name],
        "inputs": {
            port: {"types": [cls.__name__ for cls in classes], "required": required}
            for port, (classes, required) in stage.input_fields().items()
        },
        "outputs": {port: cls.__name__ for port, cls in stage.output_fields().items()},
        "options": make_options_schema(stage),
        "deprecated": stage.deprecated or None,
        "aliases": list(stage.aliases),
        "renamed": dict(stage.renamed),
    }


def describe_stage(catalog: Catalog, name: str) -> str:
    """Everything a recipe's author needs to know of a stage."""
    name = _find(catalog, name)
    stage = catalog.stages[name]
    lines = [f"{name} ({_name_plugin(catalog, name)})", "", inspect.cleandoc(stage.__doc__ or "")]
    if stage.deprecated:
        lines += ["", f"deprecated: {stage.deprecated}"]
    if stage.aliases:
        lines += ["", f"formerly: {', '.join(stage.aliases)}"]
    lines += [
        "",
        "takes:   " + _describe_ports(stage.input_fields()),
        "gives:   " + ", ".join(f"{port} ({cls.__name__})" for port, cls in stage.output_fields().items()),
    ]
    rows = list_options(stage)
    if rows:
        lines += ["", "options:"]
        for option, type_name, default, description in rows:
            lines += [f"  {option}: {type_name}{f' = {default}' if default else ''}", f"      {description}"]
            former = [old for old, new in stage.renamed.items() if new == option]
            lines += [f"      Formerly: {', '.join(former)}."] if former else []
    return show_lines("\n".join(lines))


def list_options(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(option, accepted values, default, description) of every option, those of nested groups after their group."""
    rows = []
    for name, info in model.model_fields.items():
        default = "" if info.default in (PydanticUndefined, None) else _literal(info.default)
        required = " (required)" if info.is_required() else ""
        limits = _describe_limits(info.metadata)
        description = info.description or ""
        if isinstance(info.deprecated, str):
            description += f" Deprecated: {info.deprecated}."
        rows.append((prefix + (info.alias or name), _describe_type(info.annotation) + limits + required, default, description))
        for member in (info.annotation, *get_args(info.annotation)):
            if isinstance(member, type) and issubclass(member, BaseModel):
                entry = "*." if get_origin(info.annotation) is dict else ""
                rows += list_options(member, f"{prefix}{info.alias or name}.{entry}")
    return rows


def _first_line(stage: type[Stage]) -> str:
    return (stage.__doc__ or "").strip().splitlines()[0]


def _summarise(stage: type[Stage]) -> str:
    return f"{_first_line(stage)}{' (deprecated)' if stage.deprecated else ''}"


def _describe_ports(ports: dict[str, tuple[tuple[type[Artifact], ...], bool]]) -> str:
    return ", ".join(
        f"{port} ({name_types(classes)}{'' if required else ', optional'})" for port, (classes, required) in ports.items()
    )


def _describe_type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(_literal, get_args(annotation)))
    if get_origin(annotation) in (list, tuple):
        return f"list of {_describe_type(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if members := [member for member in get_args(annotation) if member is not type(None)]:
        return " | ".join(map(_describe_type, members))
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true | false", "Path": "path"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return names.get(getattr(annotation, "__name__", ""), str(annotation))


def _describe_limits(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [f"{sign} {getattr(item, key)}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]
    return f" {', '.join(bounds)}" if bounds else ""


def _literal(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
