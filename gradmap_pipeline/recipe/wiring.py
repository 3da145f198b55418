"""Which output of an earlier step each input of a step takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..artifacts import Artifact
from ..errors import Problem
from ..stages.stage import Stage, name_types
from .catalog import Catalog
from .plugin_files import name_apart
from .recipe import Recipe, RecipeStep
from .stage_code import StageCode
from .validation import suggest
from .yaml_positions import Location

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass
class Board:
    """What the steps planned so far offer to those after them."""

    types: dict[tuple[str, str], type[Artifact]] = field(default_factory=dict)
    """Classes of artifacts, by step id and output."""
    forecasts: dict[tuple[str, str], BaseModel | None] = field(default_factory=dict)
    codes: dict[str, StageCode] = field(default_factory=dict)
    """The code of each step's stage, by step id."""
    requests: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    """What later steps request of a step, by its id."""
    unknown: set[str] = field(default_factory=set)
    """Ids of steps whose stage is not known, nor, therefore, what they make."""

    def find_codes(self, inputs: Mapping[str, tuple[str, str]]) -> tuple[StageCode, ...]:
        """The code of the steps that make inputs of classes that do not ship."""
        makers = {source[0]: None for source in inputs.values() if not StageCode.is_shipped(self.types[source])}
        return tuple(self.codes[maker] for maker in makers if maker in self.codes)

    def add_requests(self, inputs: Mapping[str, tuple[str, str]], requests: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what a step requests, by input, of the steps that make its inputs."""
        for name, request in requests.items():
            if name in inputs:
                self.requests.setdefault(inputs[name][0], []).append(request)

    def latest(self, name: str) -> tuple[str, str] | None:
        """The last output of this name."""
        return next((at for at in reversed(self.types) if at[1] == name), None)


def wire_inputs(
    step: RecipeStep,
    stage_class: type[Stage],
    at: Location,
    recipe: Recipe,
    catalog: Catalog,
    board: Board,
    problems: list[Problem],
) -> dict[str, tuple[str, str]]:
    """Give each input the output named by `from`, else the latest of its name."""
    inputs = stage_class.input_fields()
    for name in step.sources:
        if name not in inputs:
            message = f"stage {step.stage!r} has no input {name!r}; {suggest(name, inputs)}"
            problems.append(recipe.problem((*at, "from", name), message))
    wired: dict[str, tuple[str, str]] = {}
    for name, (wanted, required) in inputs.items():
        chosen = step.sources.get(name)
        if chosen is None:
            source = board.latest(name)
            if source is not None and issubclass(board.types[source], wanted):
                wired[name] = source
            elif source is not None and required:
                taken, given = name_apart(wanted, board.types[source])
                message = (
                    f"step {step.id!r} takes {taken} as {name!r}, but after step {source[0]!r} it is {given}; "
                    f"put this step before that one, or choose an earlier one with `from: {{{name}: STEP}}`"
                )
                problems.append(recipe.problem((*at, "use"), message))
            elif required and not board.unknown:  # a step whose stage is not known may have been meant to make it
                producers = catalog.producers(name, wanted)
                advice = f"put {' or '.join(producers)} before it" if producers else "no installed stage makes one"
                message = (
                    f"step {step.id!r} needs an input {name!r} ({name_types(wanted)}), and no earlier step makes one; {advice}"
                )
                problems.append(recipe.problem((*at, "use"), message))
            continue
        from_step, _, output = chosen.partition(".")
        source = (from_step, output or name)
        place = (*at, "from", name)
        if source not in board.types and from_step in board.unknown:
            continue
        if source not in board.types:
            offered = [".".join(known) for known in board.types]
            problems.append(
                recipe.problem(place, f"no earlier step makes {'.'.join(source)!r}; {suggest('.'.join(source), offered)}")
            )
        elif not issubclass(board.types[source], wanted):
            taken, given = name_apart(wanted, board.types[source])
            problems.append(recipe.problem(place, f"input {name!r} takes {taken}, but {chosen!r} is {given}"))
        else:
            wired[name] = source
    return wired
