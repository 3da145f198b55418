"""Run an export again: what `gradmap.json` says of how it is made, and whether what comes out has the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import LINEAGE
from ..checkpoint.graph import ModelGraph
from ..errors import CommandError, DifferenceError
from ..export.exports import Export
from ..export.verify import read_lineage
from ..machine.machine import Machine
from ..recipe.plan import Plan, PlannedStep
from ..recipe.recipe import MODEL_STEP, SHARED, Recipe, read_recipe
from ..text import without_places
from .provenance import describe_model, describe_surroundings, name_processor
from .revisions import find_hub_data

if TYPE_CHECKING:
    from .runner import RunState

_RECIPE = "recipe"
_PROVENANCE = "provenance"
_AGAIN = "-again"
"""What the folders are called that a replay writes, after the names of the first ones."""


def make_replay(step: PlannedStep, plan: Plan, machine: Machine, state: RunState) -> dict[str, Any]:
    """What an export says of how it is made: the recipe as far as this step, and what decides its bytes.

    Paths from the root of this machine are cut to their names.
    """
    base, place = state.outputs[MODEL_STEP]["model"], state.place
    assert isinstance(base, ModelGraph)
    assert place is not None
    written = read_recipe(plan.recipe_text, plan.recipe_path, plan.overrides).document.data
    left_out = _find_others(step, plan)
    numbers = {one.id: number for number, one in enumerate(plan.steps)}
    steps = [one for name, one in zip(numbers, written["steps"], strict=True) if name not in left_out]
    for one in plan.steps:
        for where, source in find_hub_data(one.stage, one.id):
            _set_revision(written["steps"][numbers[one.id]], where.split(".")[1:], source.revision)
    recipe = {key: value for key, value in written.items() if not key.startswith(SHARED)} | {"steps": steps}
    revision = describe_model(plan.model, base).get("revision")
    recipe["model"] = plan.model.model_copy(update={"revision": revision}).model_dump(mode="json", exclude_none=True)
    surroundings = describe_surroundings(plan, machine, base, place.device, place.threads)
    described = [one for name, one in state.described.items() if name not in left_out]
    whole = {**surroundings, "processor": name_processor(place.device), "steps": described}
    return {_RECIPE: without_places(recipe), _PROVENANCE: without_places(whole)}


def _set_revision(written: Any, place: Sequence[str], revision: str | None) -> None:
    """Write the commit that a data set was read at into the options of a step, as they are written."""
    inner = written.get("with")
    for key in place:
        following = inner.get(key) if isinstance(inner, dict) else inner[int(key)] if isinstance(inner, list) else None
        inner = following
    if isinstance(inner, dict) and revision is not None:
        inner["revision"] = revision


def _find_others(step: PlannedStep, plan: Plan) -> set[str]:
    """Steps after this one; and those that write other folders and do not lead here, with all that comes from them."""
    by_id = {one.id: one for one in plan.steps}
    leading, waiting = set(), [step.id]
    while waiting:
        name = waiting.pop()
        if name in by_id and name not in leading:
            leading.add(name)
            waiting += [source for source, _ in by_id[name].inputs.values()]
    others: set[str] = set()
    for place, one in enumerate(plan.steps):
        is_beyond = place > plan.steps.index(step)
        if is_beyond or (one.id not in leading and (one.writes or {source for source, _ in one.inputs.values()} & others)):
            others.add(one.id)
    return others


@dataclass(frozen=True)
class Replay:
    """An export that is to be made again."""

    file: Path
    """Its `gradmap.json`."""
    recipe: Recipe
    provenance: dict[str, Any]
    """What decided its bytes."""
    digests: dict[str, str]
    """SHA-256 by file, without `gradmap.json`, which holds times."""

    def use_threads(self, machine: Machine) -> Machine:
        """The machine with as many threads as made the export, where the command line says nothing of them."""
        threads = self.provenance.get("threads")
        return replace(machine, threads=threads) if machine.threads is None and isinstance(threads, int) else machine

    def check_result(self, plan: Plan, state: RunState, differences: Sequence[str]) -> str:
        """Say that the bytes are the same. Raises `DifferenceError` with what differs; `differences`: known before."""
        step = plan.steps[-1].id
        made = next((one for one in state.outputs[step].values() if isinstance(one, Export)), None)
        if made is None:
            raise CommandError(f"{str(self.file)!r}: step {step!r} writes no export, so there is nothing to compare")
        now = {name: file.sha256 for name, file in made.files.items() if name != LINEAGE}
        other = sorted(name for name in {*now, *self.digests} if now.get(name) != self.digests.get(name))
        if not other:
            return f"the same bytes as {self.file.parent}: {len(now)} files in {made.folder}, all but {LINEAGE}, which holds times"
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        known = "".join(f"\n{line}" for line in differences)
        advice = "what decides the bytes is the same, as far as is known" if not differences else "what is another this time:"
        raise DifferenceError(f"{made.folder} differs from {self.file.parent} in {shown}; {advice}{known}")


def is_replay(path: Path) -> bool:
    """Whether a path names what an export says of itself, rather than a recipe."""
    return path.name == LINEAGE and path.is_file()


def read_replay(file: Path, overrides: Sequence[str]) -> Replay:
    """What an export says of how it is made, with `--set` options. Folders that it writes get `-again` after their names.

    Raises `StageError` where it is damaged, `CommandError` where it does not say.
    """
    lineage = read_lineage(file.parent)
    recipe, provenance = lineage.get(_RECIPE), lineage.get(_PROVENANCE)
    if not isinstance(recipe, Mapping) or not isinstance(provenance, dict):
        raise CommandError(f"{str(file)!r} does not say how it is made: an earlier version wrote it; run its recipe")
    text = json.dumps(recipe, indent=2, ensure_ascii=False)
    lines = file.read_text(encoding="utf-8").splitlines()
    place = next((number for number, line in enumerate(lines) if line.startswith(f'  "{_RECIPE}": {{')), 0)
    again = [option for option in _rename_targets(recipe) if not _is_set(option, overrides)]
    digests = {name: str(written["sha256"]) for name, written in lineage["files"].items()}
    recipe_read = read_recipe("\n" * place + text, file, [*overrides, *again])  # so that messages name lines of the file
    return Replay(file, replace(recipe_read, text=text + "\n"), provenance, digests)


def _rename_targets(recipe: Mapping[str, Any]) -> list[str]:
    """`--set` options that give each folder that is written another name."""
    steps, options = recipe.get("steps"), []
    for step in steps if isinstance(steps, list) else ():
        options_of_step = step.get("with") if isinstance(step, Mapping) else None
        to = options_of_step.get("to") if isinstance(options_of_step, Mapping) else None
        if isinstance(to, str):
            options.append(f"{step.get('id') or step.get('use')}.to={json.dumps(to.rstrip('/') + _AGAIN, ensure_ascii=False)}")
    return options


def _is_set(option: str, overrides: Sequence[str]) -> bool:
    return any(override.partition("=")[0] == option.partition("=")[0] for override in overrides)
