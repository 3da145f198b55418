"""Write the reference pages from the code: `python tests/tools/reference.py docs`."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import typer

from gradmap_pipeline.cli import app
from gradmap_pipeline.recipe.catalog import Catalog, load_catalog
from gradmap_pipeline.recipe.recipe import RecipeFile
from gradmap_pipeline.report.stage_help import list_options
from gradmap_pipeline.stages.stage import name_types

_NOTE = "<!-- Written by `make docs` from the code; do not edit. -->"


def make_pages() -> dict[str, str]:
    """Text by file name under `reference/`."""
    catalog = load_catalog()
    return {"recipe.md": make_recipe_page(), "stages.md": make_stages_page(catalog), "command-line.md": make_command_page()}


def make_recipe_page() -> str:
    """Every key of a recipe but the stages' options."""
    lines = [_NOTE, "", "# Recipe reference", "", inspect.cleandoc(RecipeFile.__doc__ or ""), ""]
    lines += _options_table(list_options(RecipeFile))
    return "\n".join([*lines, ""])


def make_stages_page(catalog: Catalog) -> str:
    """Every stage that ships: what it takes, gives and accepts."""
    lines = [_NOTE, "", "# Stages"]
    for name, stage in catalog.stages.items():
        if not catalog.plugin_of[name].startswith("gradmap_plugins."):
            continue
        takes = [
            f"`{port}` ({name_types(kinds)}{'' if required else ', optional'})"
            for port, (kinds, required) in stage.input_fields().items()
        ]
        gives = [f"`{port}` ({cls.__name__})" for port, cls in stage.output_fields().items()]
        lines += ["", f"## {name}", "", inspect.cleandoc(stage.__doc__ or ""), ""]
        lines += [f"Takes {', '.join(takes)}. Gives {', '.join(gives)}.", ""]
        lines += _options_table(list_options(stage))
    return "\n".join([*lines, ""])


def make_command_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    lines = [_NOTE, "", "# Command line", "", group.help, "", group.epilog]
    for name, command in group.commands.items():
        arguments = " ".join(
            (parameter.metavar or parameter.name.upper()) if parameter.required else f"[{parameter.name.upper()}]"
            for parameter in command.params
            if parameter.param_type_name == "argument"
        )
        lines += [
            "",
            f"## gradmap {name}",
            "",
            f"`gradmap {' '.join(filter(None, (name, arguments)))} [OPTIONS]`",
            "",
            command.help,
        ]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option" and parameter.name != "help"]
        if options:
            lines += ["", "| option | default | |", "|---|---|---|"]
        for option in options:
            shown = option.opts[0] + (f" {option.metavar}" if option.metavar else "")
            default = "" if option.default in (None, False, []) or not option.show_default else f"`{option.default}`"
            lines.append(f"| `{shown}` | {default} | {option.help} |")
    return "\n".join([*lines, ""])


def _options_table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    if not rows:
        return ["No options."]
    table = ["| option | accepted | default | |", "|---|---|---|---|"]
    for option, accepted, default, description in rows:
        shown = f"`{default}`" if default else ""
        table.append(f"| `{option}` | {accepted.replace('|', 'or')} | {shown} | {description.replace('|', chr(92) + '|')} |")
    return table


def main() -> None:
    """Write the pages into the folder named on the command line."""
    folder = Path(sys.argv[1]) / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in make_pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
