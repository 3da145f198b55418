"""The result of a run as tables on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..run.summary import ModelRow, Summary
from ..text import add_row, format_seconds, make_table, say, shorten_titles

if TYPE_CHECKING:
    from rich.console import Console

_MOST_METRICS_BESIDE = 3
"""Metrics that fit as columns into the table of models; more get a table of their own."""


def print_summary(console: Console, summary: Summary, seconds: float) -> None:
    """Models with their metrics, how much of the damage a correction repaired, and steps."""
    beside = summary.columns if len(summary.columns) <= _MOST_METRICS_BESIDE else []
    columns = ("layers", "parameters", "bytes", *shorten_titles(beside))
    models = make_table("model", *columns, right=columns)
    for row in summary.models:
        figures = [_show_figure(row, column) for column in beside]
        add_row(models, row.label, str(row.layers), f"{row.parameters:,}", f"{row.bytes:,}", *figures)
    steps = make_table("step", "stage", "time", right=("time",))
    for step in summary.steps:
        add_row(steps, step.step, step.stage, "from the store" if step.cached else format_seconds(step.seconds))
    steps.add_section()
    add_row(steps, "all", "", format_seconds(seconds))
    console.print(models)
    if not beside and summary.columns:
        labels = [row.label for row in summary.models]
        names = [
            label if labels.count(label) == 1 else f"{label}, {row.step}" for label, row in zip(labels, summary.models, strict=True)
        ]
        metrics = make_table("metric", *names, right=names)
        for title, column in zip(shorten_titles(summary.columns), summary.columns, strict=True):
            add_row(metrics, title, *(_show_figure(row, column) for row in summary.models))
        console.print(metrics)
    for dataset, model, share in summary.closed_gaps():
        say(console, f"{model.step} closes {share:.1%} of the gap in log-perplexity that pruning opened on {dataset}.")
    for remark in summary.remarks:
        say(console, remark)
    console.print(steps)


def _show_figure(row: ModelRow, column: str) -> str:
    return row.metrics[column].figure if column in row.metrics else ""
