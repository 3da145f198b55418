"""The result of a run as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..text import format_seconds, shorten_titles
from .console import add_row, fits, make_table, print_table, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..run.summary import ModelRow, Summary


def print_summary(console: Console, summary: Summary, seconds: float) -> None:
    """Models with their metrics, how much of the damage a correction repaired, and steps."""
    rows = summary.models
    cells = [[row.label, str(row.layers), f"{row.parameters:,}", f"{row.bytes:,}"] for row in rows]
    figures = [[_show_figure(row, column) for column in summary.columns] for row in rows]
    print_models(console, ("model", "layers", "parameters", "bytes"), cells, summary.columns, figures, [row.step for row in rows])
    for dataset, model, share in summary.closed_gaps():
        say(console, f"{model.step} closes {share:.1%} of the gap in log-perplexity that pruning opened on {dataset}.")
    for remark in summary.remarks:
        say(console, remark)
    steps = make_table("step", "stage", "time", right=("time",))
    for step in summary.steps:
        add_row(steps, step.step, step.stage, "from the store" if step.cached else format_seconds(step.seconds))
    steps.add_section()
    add_row(steps, "all", "", format_seconds(seconds))
    print_table(console, steps)


def print_models(
    console: Console,
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    columns: Sequence[str],
    figures: Sequence[Sequence[str]],
    steps: Sequence[str],
) -> None:
    """One table of models, or, where that is too wide, one of models and below it one of metrics.

    `headings`, `cells`: what is told of each model, its label first. `columns`, `figures`: its metrics. `steps`: that made them.
    """
    titles = shorten_titles(columns)
    beside = _make_models([*headings, *titles], [[*row, *numbers] for row, numbers in zip(cells, figures, strict=True)])
    if not columns or fits(console, beside):
        print_table(console, beside)
        return
    print_table(console, _make_models(headings, cells))
    labels = [row[0] for row in cells]
    names = [label if labels.count(label) == 1 else f"{label}, {step}" for label, step in zip(labels, steps, strict=True)]
    by_model = list(zip(titles, zip(*figures, strict=True), strict=True))
    table = make_table("metric", *names, right=names, flexible=("metric",))
    for title, numbers in by_model:
        add_row(table, title, *numbers)
    if not fits(console, table):
        table = make_table("metric", "model", "value", right=("value",), flexible=("metric", "model"))
        for title, numbers in by_model:
            for place, (name, number) in enumerate(zip(names, numbers, strict=True)):
                add_row(table, "" if place else title, name, number)
    print_table(console, table)


def _make_models(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    right = [heading for heading in headings if heading not in ("model", "step")]
    table = make_table(*headings, right=right, flexible=("removed",))
    for row in cells:
        add_row(table, *row)
    return table


def _show_figure(row: ModelRow, column: str) -> str:
    return row.metrics[column].figure if column in row.metrics else ""
