"""Recipes that use old names of stages and options: what they mean, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..stages.stage import Stage
from .recipe import Recipe, RecipeStep
from .validation import Invalid
from .yaml_positions import Location


def find_present_names(stage: type[Stage], step: RecipeStep, at: Location, recipe: Recipe) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of a step under their present names, and by present name what the recipe says for it.

    What `--set` gives stands for the same option of the file, whichever name either uses. Raises `Invalid` where an option is given
    under both names otherwise.
    """
    options: dict[str, Any] = {}
    written: dict[str, str] = {}
    complaints: list[tuple[Location, str]] = []
    for name, value in step.options.items():
        present = stage.renamed.get(name, name)
        if present in written:
            old, other = (name, written[present]) if name != present else (written[present], name)
            given = [recipe.is_override((*at, "with", each)) for each in (name, written[present])]
            if given[0] == given[1]:
                complaints.append(((old,), f"is now called {present!r}, and {other!r} is given too; leave {old!r} out"))
            if not given[0]:
                continue
        options[present], written[present] = value, name
    if complaints:
        raise Invalid(complaints)
    return options, written


def find_notices(stage: type[Stage], step: RecipeStep, written: Mapping[str, str], at: Location, recipe: Recipe) -> Iterator[str]:
    """What to write instead of old names, and what is deprecated: a line each, with the place in the recipe."""
    where = recipe.where((*at, "use"))
    if step.stage != stage.name:
        yield f"{where}: stage {step.stage!r} is now called {stage.name!r}; write `use: {stage.name}`{_keep_id(step, stage)}"
    if stage.deprecated:
        yield f"{where}: stage {stage.name!r} is deprecated: {stage.deprecated}"
    for present, name in written.items():
        place = recipe.where((*at, "with", name))
        if name != present:
            yield f"{place}: option {name!r} of stage {stage.name!r} is now called {present!r}; write that"
        said = stage.model_fields[present].deprecated if present in stage.model_fields else None
        if said:
            reason = f": {said}" if isinstance(said, str) else ""
            yield f"{place}: option {present!r} of stage {stage.name!r} is deprecated{reason}"


def _keep_id(step: RecipeStep, stage: type[Stage]) -> str:
    """How the rest of the recipe goes on to find a step that is known by its stage's old name."""
    return "" if step.given_id else f", and {stage.name!r} where the recipe speaks of step {step.id!r}"
