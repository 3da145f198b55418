"""Commands that hand out what to start from: the package of a plugin, and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_options import parse_output
from .completion import complete_shipped_recipe
from .ending import endings


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the package, as gradmap-drop-layers.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(
            "--kind", metavar="KIND", help="What its stage does: ranking, transform, correction, exporter, evaluation, quantiser."
        ),
    ] = "ranking",
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FOLDER", parser=parse_output, help="Folder to write. Default: NAME.", show_default=False),
    ] = None,
) -> None:
    """Write an installable package with one working stage, its tests and a recipe, to start a plugin from.

    The stage is called as the package, with underscores and without "gradmap-". A folder that holds anything is refused.
    """
    with endings():
        from ..report.console import print_line
        from .new_plugin import write_plugin

        folder, stage = write_plugin(name, kind, to)
        print_line(f"wrote {folder}: stage {stage}, its tests and a recipe; {folder / 'README.md'} says how to go on")


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", autocompletion=complete_shipped_recipe, help="Recipe to print.", show_default=False),
    ] = None,
) -> None:
    """List the recipes that come with the package, or print one: `gradmap recipes quickstart > mine.yaml`."""
    with endings():
        from ..recipe.shipped_recipes import list_recipes, read_recipe

        if name is None:
            print(list_recipes())
        else:
            print(read_recipe(name), end="")
