"""A recipe file to a Recipe. Knows nothing about which stages exist."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..checkpoint.short_form import HUB_NAME, explain_ambiguous, read_short_form
from ..checkpoint.source import ModelSource
from ..errors import Problem, RecipeError
from ..machine.input_files import read_input
from .limits import Limit
from .validation import LARGEST_INTEGER, Invalid, suggest, validate
from .yaml_positions import Document, Location, load_yaml

MAX_BYTES = 1 << 20
"""Size of a recipe file."""
SHARED = "x-"
"""What the names of top-level keys begin with that hold blocks for other places of the recipe, which take them by their anchors."""
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
    limits: dict[str, Limit] = Field(
        default_factory=dict,
        description="Values that pass, by metric: `{perplexity: {max: 30}}`. The run ends with exit code 5 where one does not.",
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
    description: str | None = Field(None, description="What the recipe is for, in the author's words; no result depends on it.")
    model: ModelSource = Field(description="The model to start from.")
    seed: int = Field(0, ge=0, le=LARGEST_INTEGER, description="Seed of all that is drawn at random.")
    steps: list[RecipeStep] = Field(min_length=1, description="Steps, in order.")


@dataclass(frozen=True)
class Recipe:
    """A recipe as its author wrote it, with the place of every value, and what is wrong with it in itself."""

    path: Path
    document: Document
    overrides: dict[Location, str]
    """`--set` options, by the location they replace."""
    model: ModelSource | None = None
    """None where it is invalid."""
    seed: int = 0
    steps: tuple[RecipeStep, ...] = ()
    broken: frozenset[int] = frozenset()
    """Steps that are invalid in themselves: of these, only the stage and the id are known."""
    problems: tuple[Problem, ...] = ()
    text: str = ""
    """The file as it was read."""
    description: str = ""

    def where(self, location: Location) -> str:
        """`file:line:column` of a value, or the command-line option that set it."""
        place = self._override_at(location)
        return self.document.where(location) if place is None else f"--set {self.overrides[place]}"

    def is_override(self, location: Location) -> bool:
        """Whether the command line has set a value."""
        return self._override_at(location) is not None

    def problem(self, location: Location, message: str) -> Problem:
        """What is wrong with a value; with advice where a `--set` option clashes with what the file says beside it."""
        inside = [override for place, override in self.overrides.items() if place[: len(location)] == location != place]
        if inside:
            group = inside[0].partition("=")[0].rpartition(".")[0]
            message += f"; an option of the file is unset by --set {group}.OPTION=null"
        place = self._override_at(location)
        order = (0, *self.document.position(location)) if place is None else (1, list(self.overrides).index(place), 0)
        return Problem(self.where(location), message, order)

    def _override_at(self, location: Location) -> Location | None:
        places = [place for place in self.overrides if place == location[: len(place)]]
        return max(places, key=len, default=None)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `--set` options. Raises `RecipeError` where it cannot be read; else notes every problem."""
    return read_recipe(_read_text(path), path, overrides)


def read_recipe(text: str, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a text. `path`: what messages call it. Raises as `load_recipe`."""
    document = load_yaml(text, str(path))
    if not isinstance(document.data, dict):
        shown = "a list" if isinstance(document.data, list) else repr(document.data)
        message = f"a recipe is a mapping with the keys version, model and steps; found {shown}"
        raise RecipeError([Problem(document.where(()), message)])
    applied: dict[Location, str] = {}
    problems: list[Problem] = []
    faulty: set[Location] = set()
    for override in overrides:
        try:
            applied[_apply(document.data, override)] = override
        except RecipeError as error:
            problems += [replace(problem, order=(1, len(applied), 0)) for problem in error.problems]
            faulty.add(_find_target(document.data, override))  # as it stands in the file, it is not what is meant
    recipe = Recipe(path, document, applied, text=text)
    ambiguity = None if recipe.is_override(("model",)) else _find_ambiguity(document.data.get("model"), path)
    if ambiguity is not None:
        problems.append(recipe.problem(("model",), f"model: {ambiguity}"))
        faulty.add(("model",))
    try:
        validate(RecipeFile, {key: value for key, value in document.data.items() if not key.startswith(SHARED)})
    except Invalid as invalid:
        problems += [recipe.problem(at, _name_key(at, message)) for at, message in invalid.complaints]
        faulty |= {at for at, _ in invalid.complaints}
    return replace(recipe, problems=tuple(problems), **_read_valid_parts(document.data, faulty))


def _find_ambiguity(model: Any, path: Path) -> str | None:
    """Why a model in its short form may be a folder beside the recipe, too, where that is not the current folder."""
    if isinstance(model, str) and HUB_NAME.fullmatch(model) and (path.parent / model).is_dir() and not Path(model).exists():
        folder = path.parent / model
        return explain_ambiguous(model, f"beside {str(path)!r}", str(folder if folder.is_absolute() else f"./{folder}"))
    return None


def _read_valid_parts(data: dict[str, Any], faulty: Collection[Location]) -> dict[str, Any]:
    """The fields of a Recipe, as far as they are valid, so that what stands beside a fault is checked too."""

    def is_valid(*location: int | str) -> bool:
        return not any(at[: len(location)] == location for at in faulty)

    model = validate(ModelSource, data["model"]) if "model" in data and is_valid("model") else None
    steps: list[RecipeStep] = []
    broken: set[int] = set()
    written = data.get("steps")
    for index, step in enumerate(written if isinstance(written, list) else []):
        if is_valid("steps", index):
            steps.append(validate(RecipeStep, step))
            continue
        broken.add(index)
        given = step if isinstance(step, dict) else {}
        stage, step_id = given.get("use"), given.get("id")
        known_id = step_id if isinstance(step_id, str) else None
        steps.append(RecipeStep.model_construct(stage=stage if isinstance(stage, str) else "", given_id=known_id))
    seed = data.get("seed", 0) if is_valid("seed") else 0
    description = (data.get("description") or "") if is_valid("description") else ""
    return {"model": model, "seed": seed, "description": description, "steps": tuple(steps), "broken": frozenset(broken)}


def _name_key(location: Location, message: str) -> str:
    """Say which key a complaint about a value is about."""
    if len(location) == 1 and message.startswith("unknown key") and "did you mean" not in message:
        message += f"; a block to share has a name that begins with {SHARED!r}"
    key = ".".join(str(part) for part in location if isinstance(part, str))
    return f"{key}: {message}" if message.startswith("found ") else message


def _read_text(path: Path) -> str:
    try:
        content = read_input(path, MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        near = None if path.exists() else _find_near_name(path)
        advice = "name a recipe file" if near is None else f"did you mean {str(near)!r}?"
        raise RecipeError([Problem(str(path), f"cannot be read: {reason}; {advice}")]) from error
    if len(content) > MAX_BYTES:
        raise RecipeError([Problem(str(path), f"is not a recipe: it holds more than {MAX_BYTES >> 20} MiB")])
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RecipeError([Problem(str(path), "is not text in UTF-8 but in UTF-16; save it as UTF-8")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"is not text in UTF-8: byte 0x{content[error.start]:02X} on line {line}; save it as UTF-8"
        raise RecipeError([Problem(str(path), message)]) from error


def _find_near_name(path: Path) -> Path | None:
    """The recipe in the same folder whose name is most like that of a file that is not there."""
    with suppress(OSError, ValueError):
        files = sorted(file for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml", ".json"))
        near = get_close_matches(path.stem, [file.stem for file in files], n=1)
        return next((file for file in files if [file.stem] == near), None)
    return None


def _apply(data: dict[str, Any], override: str) -> Location:
    """Replace one value, and return its location."""
    where = f"--set {override}"
    target, equals, text = override.partition("=")
    keys = target.split(".")
    if not equals or not all(keys):
        raise RecipeError([Problem(where, "must look like STEP.OPTION=VALUE, for example prune.ratio=0.3")])
    value = load_yaml(text or "''", where).data
    if keys[0] == "model" and len(keys) > 1 and isinstance(data.get("model"), str):
        with suppress(ValueError):  # what is wrong with it is told with the whole
            data["model"] = read_short_form(data["model"])
    if keys[0] in ("model", "seed"):
        location: Location = tuple(keys)
    else:
        ids = _list_ids(data)
        if keys[0] not in ids:
            raise RecipeError([Problem(where, f"no step {keys[0]!r} in this recipe; {suggest(keys[0], [*ids, 'model', 'seed'])}")])
        if len(keys) == 1:
            raise RecipeError([Problem(where, f"names no option of step {keys[0]!r}; write {keys[0]}.OPTION=VALUE")])
        location = ("steps", ids.index(keys[0]), *(() if keys[1] == "limits" else ("with",)), *keys[1:])
    inner: Any = data
    for depth, key in enumerate(location[:-1]):
        if isinstance(inner, dict) and inner.get(str(key)) is None:
            inner[str(key)] = {}
        inner = inner[key]
        if not isinstance(inner, dict) and not isinstance(location[depth + 1], int):
            written = ".".join(map(str, location[2 if location[2:3] == ("limits",) else 3 : depth + 1])) or keys[0]
            shown = "a list" if isinstance(inner, list) else "not a mapping"
            raise RecipeError([Problem(where, f"{written!r} is {shown}; replace the whole of it")])
    inner[location[-1]] = value
    return location


def _find_target(data: dict[str, Any], override: str) -> Location:
    """What an option means to change: a step, or a value beside the steps."""
    name = override.partition("=")[0].partition(".")[0]
    ids = _list_ids(data)
    return ("steps", ids.index(name), "with") if name in ids else (name,)


def _list_ids(data: dict[str, Any]) -> list[str]:
    steps = data.get("steps")
    return [
        str(step.get("id") or step.get("use")) if isinstance(step, dict) else ""
        for step in (steps if isinstance(steps, list) else [])
    ]
