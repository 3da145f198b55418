"""A recipe file to a Recipe. Knows nothing about which stages exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import Problem, RecipeError
from .model.source import ModelSource
from .validation import Invalid, suggest, validate
from .yaml_positions import Document, Location, load_yaml

MODEL_STEP = "model"
"""Id under which the recipe's model is the first output."""


class RecipePlace(BaseModel):
    """Where a step runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: Path = Field(description="Python to run the step in, where the libraries of its stage are installed.")


class RecipeStep(BaseModel):
    """One use of a stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str = Field(alias="use", description="Name of the stage.", min_length=1)
    options: dict[str, Any] = Field(default_factory=dict, alias="with", description="Options of the stage.")
    given_id: str | None = Field(
        None, alias="id", description="Name of the step. Default: the stage's.", pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$"
    )
    sources: dict[str, str] = Field(
        default_factory=dict,
        alias="from",
        description="Input name to `step.output`. Default: the latest output of the input's name.",
    )
    run: RecipePlace | None = Field(
        None, description="Another Python for this step. Default: for stages that need one, an environment in the store, made once."
    )

    @property
    def id(self) -> str:
        return self.given_id or self.stage


class RecipeFile(BaseModel):
    """What a recipe file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = Field(description="Version of the recipe language.")
    model: ModelSource = Field(description="The model to start from.")
    seed: int = Field(0, ge=0, description="Seed of all that is drawn at random.")
    steps: list[RecipeStep] = Field(min_length=1, description="Steps, in order.")


@dataclass(frozen=True)
class Recipe:
    """A recipe as its author wrote it, with the place of every value."""

    path: Path
    content: RecipeFile
    document: Document
    overrides: dict[Location, str]
    """`--set` options, by the location they replace."""

    def where(self, location: Location) -> str:
        """`file:line:column` of a value, or the command-line option that set it."""
        for place, override in self.overrides.items():
            if place == location[: len(place)]:
                return f"--set {override}"
        return self.document.where(location)

    def problem(self, location: Location, message: str) -> Problem:
        """What is wrong with a value; with advice where a `--set` option clashes with what the file says beside it."""
        inside = [override for place, override in self.overrides.items() if place[: len(location)] == location != place]
        if inside:
            group = inside[0].partition("=")[0].rpartition(".")[0]
            message += f"; an option of the file is unset by --set {group}.OPTION=null"
        return Problem(self.where(location), message)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `--set` options. Raises `RecipeError` with every problem."""
    document = load_yaml(_read_text(path), str(path))
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else repr(document.data)
        message = f"a recipe is a mapping with the keys version, model and steps; found {kind}"
        raise RecipeError([Problem(document.where(()), message)])
    applied = {_apply(document.data, override): override for override in overrides}
    recipe = Recipe(path, RecipeFile.model_construct(), document, applied)
    try:
        content = validate(RecipeFile, document.data)
    except Invalid as invalid:
        problems = [recipe.problem(at, _name_key(at, message)) for at, message in invalid.complaints]
        raise RecipeError(problems) from None
    return Recipe(path, content, document, applied)


def _name_key(location: Location, message: str) -> str:
    """Say which key a complaint about a value is about."""
    key = ".".join(str(part) for part in location if isinstance(part, str))
    return f"{key}: {message}" if message.startswith("found ") else message


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError([Problem(str(path), f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([Problem(str(path), "is not text in UTF-8")]) from error


def _apply(data: dict[str, Any], override: str) -> Location:
    """Replace one value, and return its location."""
    where = f"--set {override}"
    target, equals, text = override.partition("=")
    keys = target.split(".")
    if not equals or not all(keys):
        raise RecipeError([Problem(where, "must look like STEP.OPTION=VALUE, for example prune.ratio=0.3")])
    value = load_yaml(text or "''", where).data
    if keys[0] in ("model", "seed"):
        location: Location = tuple(keys)
    else:
        steps = data.get("steps") if isinstance(data.get("steps"), list) else []
        ids = [str(step.get("id") or step.get("use")) if isinstance(step, dict) else "" for step in steps or []]
        if keys[0] not in ids:
            raise RecipeError([Problem(where, f"no step {keys[0]!r} in this recipe; {suggest(keys[0], [*ids, 'model', 'seed'])}")])
        if len(keys) == 1:
            raise RecipeError([Problem(where, f"names no option of step {keys[0]!r}; write {keys[0]}.OPTION=VALUE")])
        location = ("steps", ids.index(keys[0]), "with", *keys[1:])
    inner: Any = data
    for depth, key in enumerate(location):
        if isinstance(inner, list) and not isinstance(key, int):
            written = ".".join(map(str, location[3:depth])) or keys[0]
            raise RecipeError([Problem(where, f"{written!r} is a list; replace the whole of it")])
        if depth == len(location) - 1:
            inner[key] = value
        elif isinstance(inner, dict) and not isinstance(inner.get(str(key)), dict | list):
            inner[str(key)] = {}
            inner = inner[str(key)]
        else:
            inner = inner[key]
    return location
