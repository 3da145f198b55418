"""`gradmap stages --check`: whether installed stages, or those of a file, keep the contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CommandError, PluginError
from ..machine.atomic_folder import scratch_folder
from ..recipe.catalog import Catalog, load_catalog
from ..recipe.yaml_positions import load_yaml
from ..text import show
from . import check_stage
from .sample_inputs import make_inputs, make_stage


def check_stages(target: str, plugins: Sequence[Path], overrides: Sequence[str], *, json: bool = False) -> None:
    """Check a stage by its name, or all stages of a Python file, and print what was found.

    Raises `PluginError` where one breaks the contract.
    """
    if json:
        raise CommandError("--json lists stages, and --check runs them; give one of the two")
    is_file = target.endswith(".py")
    if is_file and not Path(target).is_file():
        raise CommandError(f"--check {target}: there is no such file; name a Python file with stages, or a stage")
    catalog = load_catalog([*plugins, Path(target)] if is_file else plugins)
    stage = catalog.find(target)
    if not is_file and stage is None:
        raise PluginError(catalog.explain_unknown(target))
    names = [stage.name] if stage is not None else [name for name, plugin in catalog.plugin_of.items() if plugin == target]
    options = _read_options(overrides, names)
    findings = {name: _check(name, catalog, options.get(name, {})) for name in names}
    for name in names:
        print(show(f"{name}: {'keeps the contract' if not findings[name] else f'{len(findings[name])} found'}"), flush=True)
    broken = [f"{name}: {line}" for name in names for line in findings[name]]
    if broken:
        raise PluginError("\n".join(broken))


def _check(name: str, catalog: Catalog, options: dict[str, Any]) -> list[str]:
    cls = catalog.stages[name]
    with scratch_folder() as folder:
        stage = make_stage(cls, folder, options)
        return check_stage(stage, **make_inputs(cls, catalog, folder))


def _read_options(overrides: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options of each stage: `calibrate.samples=4`, values in YAML."""
    options: dict[str, dict[str, Any]] = {}
    for override in overrides:
        target, equals, text = override.partition("=")
        stage, _, option = target.partition(".")
        if not equals or not option or stage not in names:
            raise CommandError(
                f"--set {override}: must look like STAGE.OPTION=VALUE with a stage that is checked: {', '.join(names)}"
            )
        options.setdefault(stage, {})[option] = load_yaml(text or "''", f"--set {override}").data
    return options
