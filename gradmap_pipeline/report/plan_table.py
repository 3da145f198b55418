"""A plan as a table."""

from __future__ import annotations

import json

from ..recipe.plan import Plan
from ..text import add_row, make_console, make_table, show


def print_plan(plan: Plan) -> None:
    """Steps with the options that are set, where inputs come from, and what is known of the outputs."""
    table = make_table("step", "stage", "takes", "options", "result", fold=True)
    layers = getattr(plan.model_forecast, "layers", None)
    add_row(table, "model", "", "", plan.model.name, f"{layers} layers" if layers else "")
    for step in plan.steps:
        takes = ", ".join(".".join(source) if source[1] != name else source[0] for name, source in step.inputs.items())
        options = step.stage.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
        known = [
            f"{value} {key if value != 1 else key[:-1]}"
            for forecast in step.forecasts.values()
            if forecast is not None
            for key, value in forecast.model_dump(exclude_none=True).items()
            if key in ("layers", "decisions")
        ]
        shown = [f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
        add_row(table, step.id, step.stage.name, takes, shown, ", ".join(known))
    make_console().print(table)
    print_advice(plan)


def print_advice(plan: Plan) -> None:
    """What the user should know before a run, a line each."""
    for step in plan.steps:
        for line in step.notices:
            print(show(line))
        for line in step.advice:
            print(show(f"step {step.id!r}: {line}"))
