"""A comparison as a table on the terminal, as files, and as a plot."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..machine.extras import explain_missing
from ..metrics import show_number
from ..page.comparison import Compared, make_comparison_page
from ..stages.targets import describe_folder, new_folder
from ..text import shorten_titles, show
from .console import add_row, fits, make_console, make_table, print_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..run.comparison import Comparison, Row

_NAMES = 2
"""Columns that say of what the others are: variant and model."""


def _headings(comparison: Comparison) -> list[str]:
    return ["variant", "model", "layers", "parameters", "bytes", *comparison.columns, "seconds", "layer evaluations"]


def _cells(row: Row, comparison: Comparison) -> list[str]:
    figures = [row.metrics[column].figure if column in row.metrics else "" for column in comparison.columns]
    work = "" if row.layer_evaluations is None else f"{row.layer_evaluations:g}"
    sizes = [str(row.layers), f"{row.parameters:,}", f"{row.bytes:,}"]
    return [row.name, row.label, *sizes, *figures, f"{row.seconds:.1f}", work]


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """One table, or as many as its columns need: a row for each variant, after the models they start from."""
    to = console or make_console()
    headings = shorten_titles(_headings(comparison))
    rows = [_cells(row, comparison) for row in comparison.rows]
    columns: list[int] = []
    for column in range(_NAMES, len(headings)):
        if columns and not fits(to, _make_table(headings, rows, [*columns, column])):
            print_table(to, _make_table(headings, rows, columns))
            columns = []
        columns.append(column)
    print_table(to, _make_table(headings, rows, columns))


def _make_table(headings: list[str], rows: list[list[str]], columns: list[int]) -> Table:
    """Names, and some of the columns of figures."""
    numbers = [headings[column] for column in columns]
    table = make_table(*headings[:_NAMES], *numbers, right=numbers, flexible=headings[:_NAMES])
    for row in rows:
        add_row(table, *row[:_NAMES], *(row[column] for column in columns))
    return table


def save_comparison(comparison: Comparison, folder: Path) -> Iterator[str]:
    """Write `comparison.csv`, `comparison.md` and `comparison.html`, and `comparison.svg` where matplotlib is installed.

    Tells what was done.

    The folder takes the place of an earlier comparison. Raises `StageError` where it holds anything else.
    """
    missing = explain_missing(("matplotlib",), "plot")
    with new_folder(folder, overwrite=False) as new:
        _write_tables(comparison, new.path)
        if comparison.rows:
            compared = [
                Compared(row.name, row.label, row.layers, row.parameters, row.bytes, row.metrics, row.seconds)
                for row in comparison.rows
            ]
            page = make_comparison_page(compared, comparison.columns, f"gradmap-pipeline {__version__}")
            (new.path / "comparison.html").write_text(page, encoding="utf-8")
        if missing is None and comparison.rows:
            _draw(comparison, new.path / "comparison.svg")
        files = describe_folder(new.path)
        described = {name: file.model_dump() for name, file in files.items()}
        new.finish({"made_by": f"gradmap-pipeline {__version__}", "holds": "comparison", "files": described}, files)
    yield f"wrote {folder / 'comparison.csv'} and {folder / 'comparison.md'}"
    if comparison.rows:
        yield f"wrote {folder / 'comparison.html'}"
    if missing is not None:
        yield f"no plot: it {missing}"
    elif comparison.rows:
        yield f"wrote {folder / 'comparison.svg'}"


def _write_tables(comparison: Comparison, folder: Path) -> None:
    headings, rows = _headings(comparison), [_cells(row, comparison) for row in comparison.rows]
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(_list_numbers(comparison))
    lines = [headings, ["---"] * 2 + ["---:"] * (len(headings) - 2), *rows]
    text = "".join(f"| {' | '.join(show(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    (folder / "comparison.md").write_text(text, encoding="utf-8")


def _list_numbers(comparison: Comparison) -> Iterator[list[str]]:
    """Headings and rows for programs: numbers without commas between digits, and standard errors in columns of their own."""
    columns = comparison.columns
    uncertain = {column for row in comparison.rows for column, metric in row.metrics.items() if metric.stderr is not None}
    headings = _headings(comparison)
    before, after = headings[: headings.index("bytes") + 1], headings[-2:]
    yield [
        *before,
        *(part for column in columns for part in (column, f"{column}, standard error")[: 1 + (column in uncertain)]),
        *after,
    ]
    for row in comparison.rows:
        cells = _cells(row, comparison)
        figures: list[str] = []
        for column in columns:
            metric = row.metrics.get(column)
            figures.append("" if metric is None else show_number(metric.value))
            if column in uncertain:
                figures.append("" if metric is None or metric.stderr is None else f"{metric.stderr:.4g}")
        yield [*cells[:2], *(cell.replace(",", "") for cell in cells[2 : len(before)]), *figures, *cells[-2:]]


def _draw(comparison: Comparison, file: Path) -> None:
    """Each metric against seconds, and against size."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = comparison.columns
    figure = Figure(figsize=(11, 4.2 * len(columns)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(len(columns), 2, squeeze=False)
    for (by_seconds, by_size), column in zip(axes, columns, strict=True):
        rows = [row for row in comparison.rows if column in row.metrics]
        for number, row in enumerate(rows):
            metric = row.metrics[column]
            style = {
                "color": f"C{number % 10}",
                "marker": "os^Dv"[number // 10 % 5],
                "label": _as_label(row.name),
                "linestyle": "none",
            }
            if row.seconds:
                by_seconds.errorbar([row.seconds], [metric.value], yerr=metric.stderr, **style)
            else:
                by_seconds.axhline(metric.value, color="grey", linewidth=0.8, linestyle="--")
            by_size.errorbar([row.bytes / 1e6], [metric.value], yerr=metric.stderr, **style)
        by_seconds.set_xlabel("seconds to make")
        by_size.set_xlabel("size in MB (10⁶ bytes)")
        for plot in (by_seconds, by_size):
            plot.set_ylabel(_as_label(column))
            plot.grid(alpha=0.3)
        by_size.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, metadata={"Date": None})


def _as_label(name: str) -> str:
    """Text for matplotlib, which reads formulas between dollar signs and leaves out labels that begin with an underscore."""
    shown = show(name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
