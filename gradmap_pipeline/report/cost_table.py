"""What the steps of a plan would take, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict

from ..cost.estimate import Estimate
from ..run.costs import PlanCosts
from ..sweep.memory_plan import format_size
from ..text import dump_json, format_bytes, format_seconds
from .console import NARROW, add_row, make_console, make_table, print_table, say


def print_costs(costs: PlanCosts | None) -> None:
    """A row a step, their sum, and what the figures do not know."""
    console = make_console()
    if costs is None:
        say(console, "What it takes can be said when the model is on this machine.")
        return
    is_narrow = console.width < NARROW
    columns: tuple[str, ...] = ("memory", "read", "written", "FLOPs", "time")
    columns = columns if is_narrow else ("parameters", *columns)
    table = make_table("step", *columns, *(() if is_narrow else ("how",)), right=columns, flexible=("step", "how"))

    def add(step: str, parameters: int | None, cells: list[str], how: str) -> None:
        if is_narrow:
            add_row(table, step, *cells)
        else:
            add_row(table, step, "" if parameters is None else f"{parameters:,}", *cells, how)

    for step in costs.steps:
        cells = ["?"] * 5 if step.estimate is None else _cells(step.estimate)
        how = "" if step.estimate is None else step.estimate.how
        add(step.step, step.parameters, cells, "does not fit" if step.obstacle else how)
    table.add_section()
    is_known = all(step.estimate for step in costs.steps)
    add("all" if is_known else "all that is known", None, _cells(costs.total), "")
    print_table(console, table)
    memory = make_table("step", "memory at its peak", flexible=("memory at its peak",))
    for step in costs.steps:
        lines = {} if step.estimate is None else step.estimate.lines
        largest = sorted(((size, line) for line, size in lines.items() if size >= 1 << 20), reverse=True)
        listed = ", ".join(f"{line} {format_size(size)}" for size, line in largest)
        how = ("does not fit" if step.obstacle else step.estimate.how if step.estimate else "") if is_narrow else ""
        if listed or how:
            add_row(memory, step.step, "; ".join(filter(None, (listed, how))))
    if memory.rows:
        print_table(console, memory)
    times = "Times are of an idle machine and an empty store"
    if costs.is_disturbed:
        used = f"{costs.busy_cores:.1f} of {costs.cores} cores"
        times = f"Other programs use {used} now, so times are longer than on an idle machine. They are of an empty store"
    allowed = f"Of {format_size(costs.memory)} allowed."
    say(console, f"{allowed} {times}; reuse between decisions and downloads are not in them.")
    if costs.slow_type is not None:
        say(console, f"{costs.slow_type[0].upper()}{costs.slow_type[1:]}.")


def costs_as_json(costs: PlanCosts | None) -> str:
    """`memory`, `threads`, `cores`, `busy_cores`, `slow_type`, and `steps`.

    Each step has `step`, `parameters`, `obstacle` and `estimate`. `null` where nothing is known.
    """
    return dump_json(None if costs is None else asdict(costs))


def _cells(estimate: Estimate) -> list[str]:
    return [
        format_size(estimate.peak_bytes) if estimate.peak_bytes else "",
        format_bytes(estimate.bytes_read),
        format_bytes(estimate.bytes_written),
        f"{estimate.flops:.1e}" if estimate.flops else "",
        format_seconds(estimate.seconds),
    ]
