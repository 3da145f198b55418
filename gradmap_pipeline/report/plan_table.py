"""A plan as a table."""

from __future__ import annotations

import json

from ..plan import Plan
from .reporters import make_console


def print_plan(plan: Plan) -> None:
    """Steps with the options that are set, where inputs come from, and what is known of the outputs."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("step", "stage", "takes", "options", "result"):
        table.add_column(name, overflow="fold")
    layers = getattr(plan.model_forecast, "layers", None)
    table.add_row("model", "", "", plan.model.name, f"{layers} layers" if layers else "")
    for step in plan.steps:
        takes = ", ".join(".".join(source) if source[1] != name else source[0] for name, source in step.inputs.items())
        options = step.stage.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        known = [
            f"{value} {key if value != 1 else key[:-1]}"
            for forecast in step.forecasts.values()
            if forecast is not None
            for key, value in forecast.model_dump(exclude_none=True).items()
            if key in ("layers", "decisions")
        ]
        shown = "\n".join(f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items())
        table.add_row(step.id, step.stage.name, takes, shown, ", ".join(known))
    make_console().print(table)
