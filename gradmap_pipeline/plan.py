"""Recipe and catalog to a plan: options checked, inputs wired, before anything heavy starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .artifacts import Artifact
from .catalog import Catalog
from .environment import Environment
from .errors import GradmapError, ModelError, OptionError, PluginError, Problem, RecipeError
from .extras import explain_missing
from .model.graph import ModelGraph
from .model.source import ModelSource
from .recipe import MODEL_STEP, Recipe, RecipeStep
from .stage import Stage, name_types
from .validation import Invalid, suggest, validate
from .yaml_positions import Location


@dataclass(frozen=True)
class PlannedStep:
    """A step whose options are valid and whose inputs are wired."""

    id: str
    stage: Stage
    inputs: dict[str, tuple[str, str]]
    """Input name to (step id, output name)."""
    code: str
    """Digest of the stage's source file."""
    forecasts: dict[str, Any]
    """What is known of each output before the run."""
    environment: Environment | None = None
    """What the Python it runs in must have; None: it runs in the one that is running."""
    python: Path | None = None
    """The Python to run it in, given by the recipe. Default: one made for `environment`."""


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know."""

    model: ModelSource
    seed: int
    steps: list[PlannedStep]
    recipe_path: Path
    model_forecast: Any


@dataclass
class _Board:
    """What the steps planned so far offer to those after them."""

    types: dict[tuple[str, str], type[Artifact]] = field(default_factory=dict)
    """By step id and output."""
    forecasts: dict[tuple[str, str], Any] = field(default_factory=dict)

    def latest(self, name: str) -> tuple[str, str] | None:
        """The last output of this name."""
        return next((at for at in reversed(self.types) if at[1] == name), None)


def make_plan(recipe: Recipe, catalog: Catalog) -> Plan:
    """Check everything that can be checked before the run. Raises `RecipeError` with every problem found."""
    problems: list[Problem] = []
    board = _Board(types={(MODEL_STEP, "model"): ModelGraph})
    try:
        forecast = recipe.content.model.forecast()
    except ModelError as error:
        given = "path" if recipe.content.model.path is not None else "id"
        problems.append(Problem(recipe.where(("model", given)), str(error)))
        forecast = None
    board.forecasts[MODEL_STEP, "model"] = forecast
    steps = []
    seen: set[str] = {MODEL_STEP}
    for index, step in enumerate(recipe.content.steps):
        at: Location = ("steps", index)
        if step.id in seen:
            reserved = step.id == MODEL_STEP
            advice = "this name stands for the recipe's model" if reserved else "an earlier step has this id"
            problems.append(Problem(recipe.where((*at, "id")), f"{advice}; give this step another, as in `id: {step.id}_2`"))
        seen.add(step.id)
        planned = _plan_step(step, at, recipe, catalog, board, problems)
        if planned is not None:
            steps.append(planned)
    problems += _find_clashes(steps, recipe)
    if problems:
        raise RecipeError(problems)
    return Plan(recipe.content.model, recipe.content.seed, steps, recipe.path, forecast)


def _find_clashes(steps: list[PlannedStep], recipe: Recipe) -> list[Problem]:
    """Steps that write where another step of the recipe writes too."""
    problems = []
    writers: dict[Path, str] = {}
    numbers = {step.id: number for number, step in enumerate(recipe.content.steps)}
    for step in steps:
        for place in step.stage.writes():
            other = writers.setdefault(place.resolve(), step.id)
            if other != step.id:
                where = recipe.where(("steps", numbers[step.id], "with"))
                problems.append(Problem(where, f"step {step.id!r} writes {str(place)!r}, as step {other!r} does; choose another"))
    return problems


def _plan_step(
    step: RecipeStep, at: Location, recipe: Recipe, catalog: Catalog, board: _Board, problems: list[Problem]
) -> PlannedStep | None:
    if step.stage not in catalog.stages:
        problems.append(Problem(recipe.where((*at, "use")), catalog.explain_unknown(step.stage)))
        return None
    stage_class = catalog.stages[step.stage]
    before = len(problems)
    missing = explain_missing(stage_class.requires, stage_class.extra)
    if missing is not None:
        problems.append(Problem(recipe.where((*at, "use")), f"step {step.id!r} {missing}"))
    python = step.run.python if step.run is not None else None
    if python is not None and shutil.which(python) is None:
        advice = "give the path of a Python, as in `run: {python: venv/bin/python}`"
        message = f"step {step.id!r}: {str(python)!r} is not a program; {advice}"
        problems.append(Problem(recipe.where((*at, "run", "python")), message))
    stage: Stage | None = None
    try:
        stage = validate(stage_class, step.options)
    except Invalid as invalid:
        for location, message in invalid.complaints:
            problems.append(recipe.problem((*at, "with", *location), _name_option(step, location, message)))
    inputs = _wire(step, stage_class, at, recipe, catalog, board, problems)
    forecasts: Mapping[str, Any] = {}
    if stage is not None and len(problems) == before:
        known = {name: board.forecasts.get(source) for name, source in inputs.items()}
        try:
            forecasts = stage.forecast(known)
            if not isinstance(forecasts, Mapping):
                raise TypeError(f"it must return a mapping of output names, got {type(forecasts).__name__}")
        except OptionError as error:
            place = recipe.where((*at, "with", error.option))
            problems.append(Problem(place, _name_option(step, (error.option,), str(error))))
        except (GradmapError, KeyboardInterrupt):
            raise
        except BaseException as error:
            plugin = catalog.plugin_of[step.stage]
            raise PluginError(f"forecast() of stage {step.stage!r} ({plugin}) failed: {type(error).__name__}: {error}") from error
    kinds = stage_class.output_fields() if stage is None else stage.output_types()
    for name, kind in kinds.items():
        board.types.pop((step.id, name), None)
        board.types[step.id, name] = kind
        board.forecasts[step.id, name] = forecasts.get(name)
    if stage is None:
        return None
    environment = stage_class.environment if python is None else stage_class.environment or Environment(())
    return PlannedStep(step.id, stage, inputs, catalog.code_of[step.stage], dict(forecasts), environment, python)


def _wire(
    step: RecipeStep,
    stage_class: type[Stage],
    at: Location,
    recipe: Recipe,
    catalog: Catalog,
    board: _Board,
    problems: list[Problem],
) -> dict[str, tuple[str, str]]:
    """Give each input the output named by `from`, else the latest of its name."""
    inputs = stage_class.input_fields()
    for name in step.sources:
        if name not in inputs:
            message = f"stage {step.stage!r} has no input {name!r}; {suggest(name, inputs)}"
            problems.append(Problem(recipe.where((*at, "from", name)), message))
    wired: dict[str, tuple[str, str]] = {}
    for name, (wanted, required) in inputs.items():
        chosen = step.sources.get(name)
        if chosen is None:
            source = board.latest(name)
            if source is not None and issubclass(board.types[source], wanted):
                wired[name] = source
            elif source is not None and required:
                kind = board.types[source].__name__
                message = (
                    f"step {step.id!r} takes a {name_types(wanted)} as {name!r}, but after step {source[0]!r} it is a {kind}; "
                    f"put this step before that one, or choose an earlier one with `from: {{{name}: STEP}}`"
                )
                problems.append(Problem(recipe.where((*at, "use")), message))
            elif required:
                producers = catalog.producers(name, wanted)
                advice = f"put {' or '.join(producers)} before it" if producers else "no installed stage makes one"
                message = (
                    f"step {step.id!r} needs an input {name!r} ({name_types(wanted)}), and no earlier step makes one; {advice}"
                )
                problems.append(Problem(recipe.where((*at, "use")), message))
            continue
        from_step, _, output = chosen.partition(".")
        source = (from_step, output or name)
        place = recipe.where((*at, "from", name))
        if source not in board.types:
            offered = [".".join(known) for known in board.types]
            problems.append(Problem(place, f"no earlier step makes {'.'.join(source)!r}; {suggest('.'.join(source), offered)}"))
        elif not issubclass(board.types[source], wanted):
            found = board.types[source].__name__
            problems.append(Problem(place, f"input {name!r} takes a {name_types(wanted)}, but {chosen!r} is a {found}"))
        else:
            wired[name] = source
    return wired


def _name_option(step: RecipeStep, location: Location, message: str) -> str:
    """Say which option of which step a complaint is about."""
    option = ".".join(map(str, location))
    return f"step {step.id!r}: option {option!r}: {message}" if option else f"step {step.id!r}: {message}"
