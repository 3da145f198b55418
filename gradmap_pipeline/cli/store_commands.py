"""The commands on the store: what it keeps, how large that is, and what goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..machine.streams import sole_output
from .command_arguments import PluginFiles, StorePath
from .command_options import check_size, parse_path
from .completion import complete_stage
from .ending import endings

store_commands = typer.Typer(no_args_is_help=True, help="See what the store keeps, check it, and remove what is not needed.")

IsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
IsDry = Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")]


@store_commands.command(name="ls")
def list_store(store: StorePath = Path(".gradmap"), json: IsJson = False) -> None:
    """List what the store keeps: stage, key, size, when a run last used it, and the recipes whose latest runs did."""
    with endings(), sole_output(json) as output:
        from ..report.store_lines import entries_as_json, format_entries
        from ..run.store_entries import list_entries
        from ..text import dump_json

        entries = list_entries(_find_store(store))
        text = dump_json(entries_as_json(entries)) if json else "\n".join(format_entries(entries))
        print(text, file=output, flush=True)


@store_commands.command(name="du")
def measure_store(store: StorePath = Path(".gradmap"), json: IsJson = False) -> None:
    """Show how large the store is, by stage and in total."""
    with endings(), sole_output(json) as output:
        from ..report.store_lines import format_totals, totals_as_json
        from ..run.store_entries import add_up, list_entries
        from ..text import dump_json

        totals = add_up(list_entries(_find_store(store)))
        text = dump_json(totals_as_json(totals)) if json else "\n".join(format_totals(totals))
        print(text, file=output, flush=True)


@store_commands.command(name="gc")
def collect_garbage(
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="What no run has used for 12h, 30d or 2w.", show_default=False)
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size",
            metavar="SIZE",
            callback=check_size,
            help="What was used longest ago, until the store has 20GiB or less.",
            show_default=False,
        ),
    ] = None,
    unused_by: Annotated[
        Path | None,
        typer.Option(
            "--unused-by",
            metavar="FOLDER",
            parser=parse_path,
            help="What the latest runs of the recipes in a folder did not use.",
            show_default=False,
        ),
    ] = None,
    dry_run: IsDry = False,
    store: StorePath = Path(".gradmap"),
) -> None:
    """Remove results, units of work and records that meet all the criteria given; what a run under way uses is left.

    What is removed is made again when a recipe needs it. Environments stay.
    """
    with endings():
        from ..errors import CommandError
        from ..machine.memory import parse_size
        from ..report.console import print_line
        from ..report.store_lines import format_collection
        from ..run.store_collection import Criteria, collect, parse_age

        if older_than is None and max_size is None and unused_by is None:
            raise CommandError("gc needs a criterion; give --older-than 30d, --max-size 20GiB or --unused-by FOLDER")
        try:
            age = None if older_than is None else parse_age(older_than)
        except ValueError as error:
            raise CommandError(f"--older-than: {error}") from error
        if unused_by is not None and not unused_by.is_dir():
            raise CommandError(f"--unused-by {str(unused_by)!r} is not a folder; name the folder of the recipes that you keep")
        criteria = Criteria(age, None if max_size is None else parse_size(max_size), unused_by)
        done = collect(_find_store(store), criteria, is_dry=dry_run)
        for line in format_collection(done, is_dry=dry_run):
            print_line(line)


@store_commands.command(name="rm")
def remove_named(
    steps: Annotated[
        list[str],
        typer.Option(
            "--step",
            metavar="STAGE",
            autocompletion=complete_stage,
            help="All results and units of a stage, or results of a step id. Repeatable.",
        ),
    ] = [],  # noqa: B006 - typer reads the default
    keys: Annotated[
        list[str], typer.Option("--key", metavar="KEY", help="What has a key that begins so, as ls shows it. Repeatable.")
    ] = [],  # noqa: B006
    runs: Annotated[
        list[str],
        typer.Option(
            "--run", metavar="RECIPE|NUMBER", help="What only this recipe used; or the record of a run, by its number. Repeatable."
        ),
    ] = [],  # noqa: B006
    dry_run: IsDry = False,
    store: StorePath = Path(".gradmap"),
) -> None:
    """Remove what is named; what a run under way uses is left. It is made again when a recipe needs it."""
    with endings():
        from ..errors import CommandError
        from ..report.console import print_line
        from ..report.store_lines import format_collection
        from ..run.store_collection import choose_named, remove

        if not (steps or keys or runs):
            raise CommandError(
                "rm removes what is named; give --step STAGE, --key KEY or --run RECIPE; gradmap store ls shows them"
            )
        root = _find_store(store)
        done = remove(root, choose_named(root, steps, keys, runs), is_dry=dry_run)
        for line in format_collection(done, is_dry=dry_run):
            print_line(line)


@store_commands.command(name="check")
def check_all(store: StorePath = Path(".gradmap"), plugins: PluginFiles = []) -> None:  # noqa: B006
    """Compare all that the store keeps with its digests, and name what is damaged. Exit code 4: something is.

    A run never uses what is damaged: it makes it again.
    """
    with endings():
        from ..errors import StageError
        from ..recipe.catalog import load_catalog
        from ..report.console import print_line
        from ..report.store_lines import format_findings, name_entry
        from ..run.store_check import check_store

        looked_at, findings = check_store(_find_store(store), load_catalog(plugins))
        for line in format_findings(looked_at, findings):
            print_line(line)
        damaged = [f"{name_entry(one.entry)} is damaged: {one.reason}" for one in findings if one.is_damage]
        if damaged:
            keys = dict.fromkeys(f"--key {one.entry.key[:12]}" for one in findings if one.is_damage and one.entry.key)
            advice = [f"a run makes them again; gradmap store rm {' '.join(keys)} removes them"] if keys else []
            raise StageError("\n".join([*damaged, *advice]))


def _find_store(folder: Path) -> Path:
    """The folder of a store that is there. Raises `CommandError`."""
    from ..errors import CommandError

    if not (folder / "steps").is_dir():
        raise CommandError(f"--store {str(folder)!r} is no store; name the folder of one, as a run makes it")
    return folder.resolve()
