"""A model at several depths, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..run.size_curve import CurvePoint
from .console import add_row, make_console, make_table, print_table, say


def print_curve(curve: Sequence[CurvePoint], text: str, ranking: str) -> None:
    """A row for each depth, and how a recipe asks for one. `text`: that perplexity is measured on."""
    console = make_console()
    columns = ("parameters", "bytes", "speed", "perplexity", "ratio")
    table = make_table("layers", *columns, "removed", right=("layers", *columns), flexible=("removed",))
    for point in curve:
        figures = (f"{point.parameters:,}", f"{point.bytes:,}", f"{point.speedup:.2f} x", f"{point.perplexity:.4g}")
        removed = ", ".join(map(str, point.removed))
        add_row(table, str(point.layers), *figures, f"{point.perplexity_ratio:.3f}", removed)
    print_table(console, table)
    say(console, f"Ranked by {ranking}. Perplexity is of {text}, before any correction; a correction closes a part of the gap.")
    say(console, "Speed is estimated for a pass over one sequence: from one layer and the head, tried with made-up weights.")
    smallest = curve[-1]
    say(
        console,
        "In a recipe: `prune: {layers: N}`, or a target, as "
        f"`prune: {{target: {{parameters: {smallest.parameters}}}}}`, `{{bytes: {smallest.bytes}}}` or "
        f"`{{max_perplexity_ratio: {smallest.perplexity_ratio:.2f}}}`.",
    )
