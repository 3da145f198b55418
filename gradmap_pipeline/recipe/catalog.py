"""Find plugins and list the stages they provide."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pluggy

from .. import API_VERSION
from ..artifacts import Artifact
from ..errors import GradmapError, PluginError, describe_value
from ..interruptions import is_interruption
from ..machine.shortages import is_shortage
from ..machine.streams import plugin_code
from ..stages import hookspecs
from ..stages.stage import Stage, is_abstract
from .plugin_contract import check_module, check_stages, explain_failure
from .plugin_files import name_module, open_folder
from .stage_code import StageCode
from .validation import suggest

GROUP = "gradmap"


class Origin(NamedTuple):
    """A distribution that installs a plugin."""

    name: str
    version: str


class Catalog:
    """All stages that recipes can use, by name."""

    def __init__(self) -> None:
        self.stages: dict[str, type[Stage]] = {}
        self.aliases: dict[str, str] = {}
        """By old name of a stage: its present one."""
        self.plugin_of: dict[str, str] = {}
        self.code_of: dict[str, StageCode] = {}
        """By stage: the code that makes its results, so that editing it, or installing another version, runs the stage again."""
        self.plugin_files: list[Path] = []
        """Single files that were given on the command line."""
        self.origin_of: dict[str, Origin | None] = {}
        """By stage: the distribution that installs it; None where none does."""
        self.broken: dict[str, str] = {}
        """By plugin: why it is left out."""
        self.meant_by: dict[str, str] = {}
        """By plugin that is left out: the name that its distribution gives it, which is that of its stage or near it."""

    def add(self, plugin: str, module: ModuleType, distribution: Distribution | None = None) -> None:
        """Take in the stages of a plugin. Raises `PluginError` and changes nothing when it breaks the contract.

        `distribution`: what installed the plugin, if anything did.
        """
        check_module(plugin, module, API_VERSION)
        stages = _stages_of(plugin, module)
        check_stages(plugin, stages, API_VERSION)
        for stage in stages:
            for name in (stage.name, *stage.aliases):
                other = self.find(name)
                if other is not None:
                    raise PluginError(
                        f"stage {name!r} is provided by both {self.plugin_of[other.name]!r} and {plugin!r}; "
                        "rename one or uninstall its plugin"
                    )
        for stage in stages:
            self.aliases |= dict.fromkeys(stage.aliases, stage.name)
            self.stages[stage.name] = stage
            self.plugin_of[stage.name] = plugin
            self.code_of[stage.name] = StageCode.of(stage.__module__, distribution)
            self.origin_of[stage.name] = None if distribution is None else Origin(distribution.name, distribution.version)

    def find(self, name: str) -> type[Stage] | None:
        """The stage that has or had a name."""
        return self.stages.get(self.aliases.get(name, name))

    def explain_unknown(self, name: str) -> str:
        """What to say about a stage that is not there, and of plugins that are left out, those that may have it."""
        is_near = bool(get_close_matches(name, self.stages, n=1))
        meant = [plugin for plugin in self.broken if get_close_matches(name, [self.meant_by.get(plugin, plugin)])]
        exact = [plugin for plugin in meant if self.meant_by.get(plugin) == name]
        blamed = exact or meant or ([] if is_near else list(self.broken))
        advice = [] if exact else [suggest(name, self.stages)]
        advice += [f"plugin {plugin!r} is left out: {self.broken[plugin]}" for plugin in blamed]
        return f"no stage named {name!r}; {'; '.join(advice)}"

    def producers(self, output: str, wanted: tuple[type[Artifact], ...]) -> list[str]:
        """Names of stages with an output that could fill an input."""
        return sorted(name for name, stage in self.stages.items() if issubclass(stage.output_fields().get(output, object), wanted))


def load_catalog(plugin_files: Sequence[Path] = ()) -> Catalog:
    """Collect the stages of installed plugins and of single files.

    An installed plugin that fails is noted in `broken` and left out; a file that fails raises `PluginError`.
    """
    catalog = Catalog()
    for entry in sorted(_find_entries(), key=lambda entry: (entry.value.split(".")[0] != "gradmap_plugins", entry.name)):
        try:
            catalog.add(entry.value, _load(entry), entry.dist)
        except BaseException as error:  # whatever a stranger's module does, only recipes that use it stop
            if is_interruption(error) or is_shortage(error):
                raise
            reason = explain_failure(error, API_VERSION)
            catalog.broken[entry.value] = reason.removeprefix(f"plugin {entry.value!r}").lstrip(": ")
            catalog.meant_by[entry.value] = entry.name
    packages = {folder: open_folder(folder) for folder in {file.resolve().parent for file in plugin_files}}
    for file in plugin_files:
        catalog.add(str(file), _import_file(file, packages))
        catalog.plugin_files.append(file)
    return catalog


def _find_entries() -> list[EntryPoint]:
    """What installed distributions name as plugins. One whose list cannot be read counts as one that has none."""
    with suppress(Exception):
        return list(entry_points(group=GROUP))
    by_distribution: dict[str, list[EntryPoint]] = {}
    for distribution in distributions():
        with suppress(Exception):
            entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
            by_distribution.setdefault(distribution.name, entries)  # the first on the path is the one that is imported
    return [entry for entries in by_distribution.values() for entry in entries]


def _load(entry: EntryPoint) -> ModuleType:
    with plugin_code():
        module: ModuleType = entry.load()
    return module


def _stages_of(plugin: str, module: ModuleType) -> list[type[Stage]]:
    manager = pluggy.PluginManager("gradmap")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"plugin {plugin!r}: {' '.join(str(error).split())}; the only hook is gradmap_stages()") from error
    if not manager.get_hookcallers(module):
        raise PluginError(f"plugin {plugin!r} has no function gradmap_stages() marked with @hookimpl")
    try:
        with plugin_code():
            (classes,) = manager.hook.gradmap_stages()
    except GradmapError:
        raise
    except BaseException as error:
        if is_interruption(error):
            raise
        raise PluginError(f"plugin {plugin!r}: gradmap_stages() failed: {explain_failure(error, API_VERSION)}") from error
    if not isinstance(classes, list) or not all(isinstance(stage, type) and issubclass(stage, Stage) for stage in classes):
        raise PluginError(f"plugin {plugin!r}: gradmap_stages() must return a list of Stage classes, got {describe_value(classes)}")
    base = next((stage for stage in classes if is_abstract(stage)), None)
    if base is not None:
        raise PluginError(f"plugin {plugin!r}: {base.__name__} is a base of stages, not a stage; leave it out of the list")
    return classes


def _import_file(file: Path, packages: Mapping[Path, str]) -> ModuleType:
    """The module that a file is. `packages`: by folder, the package of the modules in it."""
    if not file.is_file() or file.suffix != ".py":
        raise PluginError(f"--plugin {str(file)!r} is not a Python file")
    try:
        with plugin_code():
            return importlib.import_module(f"{packages[file.resolve().parent]}.{name_module(file)}")
    except GradmapError:
        raise
    except BaseException as error:
        if is_interruption(error):
            raise
        raise PluginError(f"plugin {str(file)!r} cannot be imported: {explain_failure(error, API_VERSION)}") from error
