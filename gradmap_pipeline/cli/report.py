"""The command that shows a run or an export as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_arguments import StorePath
from .command_options import parse_path
from .ending import endings


def report(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER|RECIPE",
            parser=parse_path,
            help="An exported folder, or a recipe file. Default: the latest finished run of the store.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[Path, typer.Option("--to", metavar="FILE.html", parser=parse_path, help="The page to write.")] = Path(
        "report.html"
    ),
    svg: Annotated[
        Path | None,
        typer.Option(
            "--svg", metavar="FILE.svg", parser=parse_path, help="The picture of the layers alone, too.", show_default=False
        ),
    ] = None,
    store: StorePath = Path(".gradmap"),
) -> None:
    """Write one page on an export, or on the latest run, of a recipe or of all: what was done, and every figure that was measured.

    The page is complete in itself and loads nothing. Nothing is computed: it shows what was recorded.
    """
    with endings(store=store):
        from ..report.console import print_line
        from ..report.page_files import check_files, read_facts, read_latest, write_pages

        check_files(to, svg)
        if source is None:
            facts, name = read_latest(store)
            print_line(name)
        else:
            facts = read_facts(source, store)
        for line in write_pages(facts, to, svg):
            print_line(line)
