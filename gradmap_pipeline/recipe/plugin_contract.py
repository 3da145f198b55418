"""What is asked of the stages of a plugin when it is loaded: names, old names, and the version of what plugins may use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import ModuleType

from ..errors import PluginError, name_error
from ..stages.stage import Stage
from .moved_names import suggest_imports
from .plugin_files import show_module

_PACKAGE = __name__.partition(".")[0]
_GUIDE = "docs/write-a-plugin.md"
_NOWHERE = f"{_GUIDE} says what plugins may use; a newer gradmap-pipeline may have it"
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_CANNOT_IMPORT = re.compile(r"cannot import name '([^']*)' from '([^']*)'")


def check_module(plugin: str, module: ModuleType, api: int) -> None:
    """Raise `PluginError` where a module requires another version of the plugin API."""
    _check_api(plugin, getattr(module, "requires_api", ""), api)


def check_stages(plugin: str, stages: Sequence[type[Stage]], api: int) -> None:
    """Raise `PluginError` where a stage requires another version of the plugin API, or has a name that recipes cannot use."""
    for stage in stages:
        _check_api(plugin, stage.requires_api, api)
    taken: dict[str, str] = {}
    for stage in stages:
        here = f"plugin {plugin!r}: class {stage.__name__} in {show_module(stage.__module__)}"
        if not _is_texts(stage.aliases):
            raise PluginError(f"{here}: 'aliases' must be a tuple of names, got {stage.aliases!r}")
        for name in (stage.name, *stage.aliases):
            if not _NAME.fullmatch(name):
                raise PluginError(f"{here} has the name {name!r}; names are lower-case words with underscores, as in prune_layers")
            if name in taken:
                raise PluginError(f"{here} has the name {name!r}, which is that of class {taken[name]} too; rename one")
            taken[name] = stage.__name__
        _check_renamed(here, stage)
        if not isinstance(stage.deprecated, str):
            raise PluginError(f"{here}: 'deprecated' must say in a text what to use instead, got {stage.deprecated!r}")


def _check_renamed(here: str, stage: type[Stage]) -> None:
    renamed = stage.renamed
    if not isinstance(renamed, Mapping) or not _is_texts((*renamed, *renamed.values())):
        raise PluginError(f"{here}: 'renamed' must be a mapping of old options to new, got {renamed!r}")
    for old, new in renamed.items():
        if new not in stage.model_fields:
            raise PluginError(f"{here}: 'renamed' leads from {old!r} to {new!r}, which is not an option")
        if old in stage.model_fields:
            raise PluginError(f"{here}: 'renamed' has {old!r}, which is still an option")


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _check_api(plugin: str, wanted: object, api: int) -> None:
    if not wanted:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        accepted = SpecifierSet(str(wanted))
    except InvalidSpecifier:
        raise PluginError(f"plugin {plugin!r}: requires_api must be such as '>=1', got {wanted!r}") from None
    if str(api) not in accepted:
        is_older = any(str(version) in accepted for version in range(api))
        advice = "upgrade the plugin" if is_older else "upgrade gradmap-pipeline"
        raise PluginError(f"plugin {plugin!r} needs plugin API {accepted}, and this gradmap-pipeline has {api}; {advice}")


def explain_failure(error: BaseException, api: int) -> str:
    """Why code of a plugin fails. Where it imports what this package lacks: what, and what to import instead."""
    return explain_lack(error, api) or name_error(error)


def explain_lack(error: BaseException, api: int) -> str | None:
    """What code of a plugin takes from this package that is not there, and what to take instead; None of any other failure."""
    missing = _find_missing(error)
    if missing is None:
        return None
    home, name = missing
    asked = f"module {home!r}" if name is None else f"{name!r} in {home!r}"
    moved = suggest_imports(error, home, name)
    advice = f"{moved}; {_GUIDE} says what plugins may use" if moved else _NOWHERE
    return f"there is no {asked} in this version (plugin API {api}); {advice}"


def _find_missing(error: BaseException) -> tuple[str, str | None] | None:
    """The module and the name in it, of this package, that an error says is not there; no name where it is the module."""
    if isinstance(error, AttributeError):
        home, name = getattr(error.obj, "__name__", None), error.name
        is_module = isinstance(error.obj, ModuleType)
        return (home, name) if is_module and isinstance(home, str) and _is_ours(home) and name else None
    if isinstance(error, ModuleNotFoundError):
        return (error.name, None) if error.name and _is_ours(error.name) else None
    if isinstance(error, ImportError):
        match = _CANNOT_IMPORT.match(str(error))
        return (match[2], match[1]) if match and _is_ours(match[2]) else None
    return None


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE
