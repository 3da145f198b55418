"""A plan as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..recipe.plan import Plan, PlannedStep
from .console import NARROW, add_row, make_console, make_table, print_line, print_table, say

if TYPE_CHECKING:
    from rich.console import Console


def print_plan(plan: Plan) -> None:
    """Steps with the options that are set, where inputs come from, and what is known of the outputs."""
    console = make_console()
    if console.width < NARROW:
        _print_list(plan, console)
        print_advice(plan)
        return
    table = make_table("step", "stage", "takes", "options", "result", flexible=("takes", "options", "result"))
    layers = getattr(plan.model_forecast, "layers", None)
    add_row(table, "model", "", "", plan.model.name, f"{layers} layers" if layers else "")
    for step in plan.steps:
        add_row(table, step.id, step.stage.name, _list_sources(step), _list_options(step), _list_known(step))
    print_table(console, table)
    print_advice(plan)


def _print_list(plan: Plan, console: Console) -> None:
    """The same for a narrow terminal: a line a step, and its options below it."""
    layers = getattr(plan.model_forecast, "layers", None)
    say(console, f"{plan.model.name}{f', {layers} layers' if layers else ''}")
    for step in plan.steps:
        stage = "" if step.id == step.stage.name else f" ({step.stage.name})"
        known = _list_known(step)
        say(console, f"{step.id}{stage} takes {_list_sources(step)}{f': {known}' if known else ''}")
        options = _list_options(step)
        if options:
            say(console, f"    {', '.join(options)}")


def _list_sources(step: PlannedStep) -> str:
    """Where the inputs come from."""
    return ", ".join(".".join(source) if source[1] != name else source[0] for name, source in step.inputs.items())


def _list_options(step: PlannedStep) -> list[str]:
    """The options that are set."""
    options = step.stage.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    return [f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def _list_known(step: PlannedStep) -> str:
    """What is known of the outputs before the run."""
    known = [
        f"{value} {key if value != 1 else key[:-1]}"
        for forecast in step.forecasts.values()
        if forecast is not None
        for key, value in forecast.model_dump(exclude_none=True).items()
        if key in ("layers", "decisions")
    ]
    return ", ".join(known)


def print_advice(plan: Plan) -> None:
    """What the user should know before a run, a line each."""
    for step in plan.steps:
        for line in step.notices:
            print_line(line)
        for line in step.advice:
            print_line(f"step {step.id!r}: {line}")
