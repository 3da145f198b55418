"""Recipe and catalog to a plan: options checked, inputs wired, before anything heavy starts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.forecast import ModelForecast
from ..checkpoint.graph import ModelGraph
from ..checkpoint.source import ModelSource
from ..errors import ModelError, OptionError, Problem, RecipeError, StageError
from ..machine.environment import Environment, check_python, find_program
from ..machine.extras import OURS, explain_missing
from ..stages.forecasts import Forecasts, Outlook
from ..stages.stage import Stage
from ..stages.targets import find_clashing_export, overlaps
from ..text import join_words
from .asking import ask, make_stage
from .catalog import Catalog
from .limits import Limit, find_faults, find_measured_input
from .places import DEFAULT_STORE, Place, find_machine_places, find_model_places, find_read_places
from .recipe import MODEL_STEP, Recipe, RecipeStep
from .renames import find_notices, find_present_names
from .stage_code import StageCode
from .validation import Invalid
from .wiring import Board, wire_inputs
from .yaml_positions import Location

_OF_STEP = re.compile(r"step ('[^']*'): (.*)", re.DOTALL)
_LIMITS_ELSEWHERE = "stands beside 'with', not in it: `limits: {perplexity: {max: 30}}`"


@dataclass(frozen=True)
class PlannedStep:
    """A step whose options are valid and whose inputs are wired."""

    id: str
    stage: Stage
    inputs: dict[str, tuple[str, str]]
    """Input name to (step id, output name)."""
    code: StageCode
    """The code that makes its results."""
    known: Forecasts
    """What is known of each input before the run."""
    forecasts: Outlook
    """What is known of each output before the run."""
    advice: tuple[str, ...] = ()
    """What the user should know before the run, a fact a line."""
    environment: Environment | None = None
    """What the Python it runs in must have; None: it runs in the one that is running."""
    python: Path | None = None
    """The Python to run it in, given by the recipe. Default: one made for `environment`."""
    writes: tuple[Path, ...] = ()
    """Files and folders outside the store that it makes."""
    plugin: str = ""
    """That the stage comes from, for messages."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """The part of the command line that set an option, by option."""
    notices: tuple[str, ...] = ()
    """What the recipe should say instead of what it does, a line each with its place."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """Limits by metric."""
    measured: str | None = None
    """The input whose place the unpruned model takes for limits that are relative to it."""


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know."""

    model: ModelSource
    seed: int
    steps: list[PlannedStep]
    recipe_path: Path
    model_forecast: ModelForecast | None
    """What is known of the recipe's model; None where it cannot be read."""
    recipe_text: str = ""
    """The recipe as it was read."""
    overrides: tuple[str, ...] = ()
    """`--set` options, in order."""
    description: str = ""


def make_plan(recipe: Recipe, catalog: Catalog, store: Path = DEFAULT_STORE) -> Plan:
    """Check everything that can be checked before the run. Raises `RecipeError` with every problem found, in order of place.

    `store`: the folder for results, which no step may write over.
    """
    steps, board, problems = _plan_steps(recipe, catalog, {})
    if board.requests:
        steps, board, problems = _plan_steps(recipe, catalog, board.requests)
    problems += _find_clashes(steps, recipe, find_machine_places(store, recipe.path, catalog.plugin_files))
    if problems or recipe.model is None:
        raise RecipeError(_join_steps(sorted(dict.fromkeys(problems), key=lambda problem: problem.order)))
    forecast: Any = board.forecasts[MODEL_STEP, "model"]
    said = (recipe.text, tuple(recipe.overrides.values()), recipe.description)
    return Plan(recipe.model, recipe.seed, steps, recipe.path, forecast, *said)


def _join_steps(problems: Sequence[Problem]) -> list[Problem]:
    """Those that several steps have in common, as a block that they share brings them in, are told once."""
    joined: dict[tuple[str, str], list[str]] = {}
    first: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        named = _OF_STEP.fullmatch(problem.message)
        step, said = (named[1], named[2]) if named else ("", problem.message)
        first.setdefault((problem.where, said), problem)
        joined.setdefault((problem.where, said), []).append(step)
    told = []
    for key, problem in first.items():
        steps = joined[key]
        told.append(replace(problem, message=f"steps {join_words(steps)}: {key[1]}") if len(steps) > 1 else problem)
    return told


def _plan_steps(
    recipe: Recipe, catalog: Catalog, requests: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[list[PlannedStep], Board, list[Problem]]:
    """The steps, what they offer and request, and what is wrong. `requests`: of later steps, by the id of who may take them."""
    problems = list(recipe.problems)
    board = Board(types={(MODEL_STEP, "model"): ModelGraph})
    board.forecasts[MODEL_STEP, "model"] = _forecast_model(recipe, problems)
    steps = []
    seen: set[str] = {MODEL_STEP}
    for index, step in enumerate(recipe.steps):
        at: Location = ("steps", index)
        if step.id in seen:
            is_reserved = step.id == MODEL_STEP
            advice = "this name stands for the recipe's model" if is_reserved else "an earlier step has this id"
            problems.append(recipe.problem((*at, "id"), f"{advice}; give this step another, as in `id: {step.id}_2`"))
        seen.add(step.id)
        planned = _plan_step(step, at, recipe, catalog, board, problems, requests.get(step.id, ()))
        if planned is not None:
            steps.append(planned)
    return steps, board, problems


def _forecast_model(recipe: Recipe, problems: list[Problem]) -> ModelForecast | None:
    if recipe.model is None:
        return None
    try:
        return recipe.model.forecast()
    except (ModelError, OSError, ValueError) as error:
        given = "path" if recipe.model.path is not None else "id"
        place = ("model", given) if isinstance(recipe.document.data["model"], dict) else ("model",)
        problems.append(recipe.problem(place, str(error)))
        return None


def _find_clashes(steps: list[PlannedStep], recipe: Recipe, places: list[Place]) -> Iterator[Problem]:
    """Steps that would write over each other, over what the recipe reads, or over `places`."""
    taken = [*places, *find_model_places(recipe.model)]
    for step in steps:
        taken += find_read_places(step.stage, step.id, step.writes)
    numbers = {step.id: number for number, step in enumerate(recipe.steps)}
    written: list[tuple[Path, str]] = []
    for step in steps:
        for folder in step.writes:
            target = folder.resolve()
            where: Location = ("steps", numbers[step.id], "with", *_find_option(step.stage, folder))
            other = next((by for place, by in written if overlaps(place, target)), None)
            if other is not None:
                message = f"writes {str(folder)!r}, which is, holds or lies in what step {other!r} writes; choose another folder"
                yield recipe.problem(where, f"step {step.id!r} {message}")
            elif (hit := next((place for place in taken if place.find_relation(target)), None)) is not None:
                message = f"would write {str(folder)!r}, which {hit.find_relation(target)} {hit.name}; choose another folder"
                yield recipe.problem(where, f"step {step.id!r} {message}")
            elif (clash := find_clashing_export(target)) is not None:
                message = f"would write {str(folder)!r}, which {clash}; choose another folder, or move that one away"
                yield recipe.problem(where, f"step {step.id!r} {message}")
            written.append((target, step.id))


def _find_option(stage: Stage, path: Path) -> Location:
    """The option that names a path; nothing where none does."""
    return next(((name,) for name, value in stage if value == path), ())


def _plan_step(
    step: RecipeStep,
    at: Location,
    recipe: Recipe,
    catalog: Catalog,
    board: Board,
    problems: list[Problem],
    requests: Sequence[Mapping[str, Any]],
) -> PlannedStep | None:
    stage_class = catalog.find(step.stage)
    if stage_class is None:
        board.unknown.add(step.id)
        if step.stage:
            problems.append(recipe.problem((*at, "use"), catalog.explain_unknown(step.stage)))
        return None
    plugin = catalog.plugin_of[stage_class.name]
    written: dict[str, str] = {}
    stage: Stage | None = None
    inputs: dict[str, tuple[str, str]] = {}
    known = Forecasts(stage_class)
    forecasts: Outlook = {}
    advice: tuple[str, ...] = ()
    before = len(problems)
    if at[1] not in recipe.broken:
        problems += _check_place(step, at, stage_class, recipe, catalog)
        try:
            options, written = find_present_names(stage_class, step, at, recipe)
            stage = make_stage(stage_class, options, step.id, plugin)
        except Invalid as invalid:
            for location, message in invalid.complaints:
                problems.append(recipe.problem(_place_of(at, location, written), _name_option(step, location, message)))
        inputs = wire_inputs(step, stage_class, at, recipe, catalog, board, problems)
        is_wired = not board.unknown or len(inputs) == len(stage_class.input_fields())
        if stage is not None and is_wired and len(problems) == before:
            classes = {name: board.types[source] for name, source in inputs.items()}
            known = Forecasts(stage_class, classes, **{name: board.forecasts.get(source) for name, source in inputs.items()})
            try:
                stage = ask("take_requests", stage, step.id, plugin, requests, known) if requests else stage
                board.add_requests(inputs, ask("request", stage, step.id, plugin, known))
                forecasts = ask("forecast", stage, step.id, plugin, known)
                advice = tuple(ask("advise", stage, step.id, plugin, known))
            except OptionError as error:
                place = _place_of(at, tuple(error.option.split(".")), written)
                problems.append(recipe.problem(place, _name_option(step, (error.option,), str(error))))
    measured = find_measured_input(stage_class, inputs, board.types)
    output_types = stage_class.output_fields() if stage is None else ask("output_types", stage, step.id, plugin)
    faults = () if stage is None else find_faults(step, stage, output_types, measured)
    problems += [recipe.problem((*at, "limits", *place), message) for place, message in faults]
    for name, output_type in output_types.items():
        board.types.pop((step.id, name), None)
        board.types[step.id, name] = output_type
        board.forecasts[step.id, name] = forecasts.get(name)
    if stage is None:
        return None
    python = step.run.python if step.run is not None else None
    environment = stage_class.environment if python is None else stage_class.environment or Environment(())
    code = board.codes[step.id] = replace(catalog.code_of[stage_class.name], behind=board.find_codes(inputs))
    places = {present: recipe.where((*at, "with", name)) for present, name in written.items()}
    overrides = {name: place for name, place in places.items() if place.startswith("--set ")}
    notices = tuple(find_notices(stage_class, step, written, at, recipe))
    settings = (
        environment,
        python,
        tuple(ask("writes", stage, step.id, plugin)),
        plugin,
        overrides,
        notices,
        step.limits,
        measured,
    )
    return PlannedStep(step.id, stage, inputs, code, known, dict(forecasts), advice, *settings)


def _place_of(at: Location, location: Location, written: Mapping[str, str]) -> Location:
    """Where the recipe says an option, under whichever name."""
    first, *rest = location or ("",)
    return (*at, "with", written.get(str(first), first), *rest) if location else (*at, "with")


def _check_place(step: RecipeStep, at: Location, stage_class: type[Stage], recipe: Recipe, catalog: Catalog) -> Iterator[Problem]:
    """What is missing where the step is to run."""
    origin = catalog.origin_of[stage_class.name]
    missing = explain_missing(stage_class.requires, stage_class.extra, OURS if origin is None else origin.name)
    if missing is not None:
        yield recipe.problem((*at, "use"), f"step {step.id!r} {missing}")
    python = step.run.python if step.run is not None else None
    place = (*at, "run", "python")
    if python is not None and shutil.which(python) is None:
        advice = "give the path of a Python, as in `run: {python: venv/bin/python}`"
        yield recipe.problem(place, f"step {step.id!r}: {str(python)!r} is not a program; {advice}")
    elif python is not None:
        try:
            check_python(find_program(python), stage_class.environment or Environment(()))
        except StageError as error:
            yield recipe.problem(place, f"step {step.id!r}: {error}")


def _name_option(step: RecipeStep, location: Location, message: str) -> str:
    """Say which option of which step a complaint is about."""
    if location == ("limits",):
        message = _LIMITS_ELSEWHERE
    option = ".".join(map(str, location))
    return f"step {step.id!r}: option {option!r}: {message}" if option else f"step {step.id!r}: {message}"
