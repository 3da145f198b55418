"""`gradmap log`, `show` and `diff`: what the store knows of its runs. They import nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..machine.streams import sole_output
from .command_arguments import PluginFiles, RecordStore
from .command_options import parse_text
from .ending import endings

_RUN_HELP = "A run: the beginning of its id, last, or last~1 for the one before."


def log(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", parser=parse_text, help="List the runs of this recipe file alone.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Runs to list; 0: all.")] = 20,
    store: RecordStore = Path(".gradmap"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, and nothing else.")] = False,
) -> None:
    """List the runs of a store, newest first: when, of which recipe, how they ended, and what they came to."""
    with sole_output(json) as output, endings():
        from ..report.run_log import list_heads, print_log
        from ..text import dump_json

        heads, count = list_heads(store, limit, recipe)
        if json:
            for head in heads:
                print(dump_json(head), file=output, flush=True)
        else:
            print_log(heads, count, store)


def show(
    run: Annotated[str, typer.Argument(metavar="RUN", parser=parse_text, help=_RUN_HELP)] = "last",
    recipe: Annotated[bool, typer.Option("--recipe", help="Print the recipe as it was run, and nothing else.")] = False,
    store: RecordStore = Path(".gradmap"),
    json: Annotated[bool, typer.Option("--json", help="Print the whole record as one JSON object.")] = False,
) -> None:
    """Show a run: how it ended, what it decided and measured, with what it was computed, and its recipe."""
    with sole_output(json or recipe) as output, endings():
        from ..report.run_log import print_run
        from ..run.difference import load_run
        from ..text import dump_json

        record = load_run(store, run)
        if json:
            print(dump_json(record), file=output, flush=True)
        elif recipe:
            print(record["recipe"], end="", file=output, flush=True)
        else:
            print_run(record)


def diff(
    one: Annotated[
        str, typer.Argument(metavar="A", parser=parse_text, help="A run, a recipe file, or the folder of an export.")
    ] = "last~1",
    other: Annotated[str, typer.Argument(metavar="B", parser=parse_text, help="Another.")] = "last",
    store: RecordStore = Path(".gradmap"),
    plugins: PluginFiles = [],  # noqa: B006 - typer reads the default
    json: Annotated[bool, typer.Option("--json", help="Print the differences as one JSON object.")] = False,
) -> None:
    """Tell what differs between two runs, recipes or exports: options, data, versions, decisions and metrics.

    Without arguments: between the latest two runs. Of a recipe, options alone are known.
    """
    with sole_output(json) as output, endings():
        from ..report.run_log import print_difference
        from ..run.difference import find_differences, read_side
        from ..text import dump_json

        first, second = (read_side(name, store, plugins) for name in (one, other))
        differing = find_differences(first, second)
        if json:
            print(dump_json({"a": first.name, "b": second.name, "differences": differing}), file=output, flush=True)
        else:
            print_difference(first, second, differing)
