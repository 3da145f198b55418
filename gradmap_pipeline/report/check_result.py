"""What a check saw of a recipe, as lines and as JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import GradmapError, Problem, RecipeError
from ..recipe.plan import Plan
from .console import print_line
from .plan_table import print_advice

_PLACE = re.compile(r"(?P<file>.+):(?P<line>\d+):(?P<column>\d+)", re.DOTALL)


def print_check(recipe: Path, plan: Plan) -> None:
    """Advice, and that there is no problem."""
    print_advice(plan)
    count = len(plan.steps)
    print_line(f"{recipe}: no problems in {count} step{'' if count == 1 else 's'}")


def describe_check(recipe: Path, plan: Plan | None, failure: GradmapError | None) -> dict[str, Any]:
    """One recipe: its steps, the problems, and what the user should know before a run.

    A problem has `where` and `message`; `file`, `line` and `column`, counted from 1, where it has a place in a file.
    """
    steps = [] if plan is None else plan.steps
    advice = [{"step": step.id, "text": line} for step in steps for line in (*step.notices, *step.advice)]
    return {
        "recipe": str(recipe),
        "steps": [step.id for step in steps],
        "problems": [] if failure is None else [_describe(problem) for problem in _problems_of(failure)],
        "exit_code": 0 if failure is None else failure.exit_code,
        "advice": advice,
    }


def _problems_of(failure: GradmapError) -> list[Problem]:
    return failure.problems if isinstance(failure, RecipeError) else [Problem(failure.where or "", str(failure))]


def _describe(problem: Problem) -> dict[str, Any]:
    place = _PLACE.fullmatch(problem.where)
    parts = {} if place is None else {"file": place["file"], "line": int(place["line"]), "column": int(place["column"])}
    return {"where": problem.where or None, **parts, "message": problem.message}
