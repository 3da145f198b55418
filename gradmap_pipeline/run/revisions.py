"""Commits of the models and data sets on the hub that a plan names by branch or tag, or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..checkpoint.graph import ModelGraph
from ..data.sources import DatasetSource
from ..errors import ModelError, first_line
from ..recipe.plan import Plan
from ..recipe.recipe import MODEL_STEP

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Revision(BaseModel):
    """What a recipe says of the revision of one model or data set, and the commit that this was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: str
    """`model`, or step and option: `calibrate.dataset`, `calibrate.dataset.mix.0`."""
    asked: str | None
    commit: str


def find_revisions(plan: Plan, base: ModelGraph) -> list[Revision]:
    """Commits of all that a plan reads from the hub. Raises `ModelError` where the hub does not tell.

    `base`: the plan's model, which is on this machine.
    """
    revisions = []
    folder = base.base.folder
    if plan.model.id is not None and folder.parent.name == "snapshots":
        revisions.append(Revision(place=MODEL_STEP, asked=plan.model.revision, commit=folder.name))
    for step in plan.steps:
        for place, source in find_hub_data(step.stage, step.id):
            revisions.append(Revision(place=place, asked=source.revision, commit=_find_commit(source, place)))
    return revisions


def _find_commit(source: DatasetSource, place: str) -> str:
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    assert source.id is not None
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.id, revision=source.revision).sha
    except Exception as error:  # the hub client raises a dozen unrelated types for the same user-facing fact
        raise ModelError(
            f"{place}: the commit of data set {source.id!r} cannot be learned from the Hugging Face hub "
            f"({type(error).__name__}: {first_line(error)}); check the network, or name a commit as its 'revision'"
        ) from error
    if commit is None:
        raise ModelError(f"{place}: the hub tells no commit of data set {source.id!r}; name one as its 'revision'")
    return commit


def find_hub_data(value: Any, place: str) -> Iterator[tuple[str, DatasetSource]]:
    """Data sets of the hub in a stage's options, each with its place."""
    if isinstance(value, DatasetSource) and value.id is not None:
        yield place, value
    elif isinstance(value, BaseModel):
        fields = type(value).model_fields
        for name, inner in value:  # and not by attribute, at which an option that is deprecated warns
            yield from find_hub_data(inner, f"{place}.{fields[name].alias or name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from find_hub_data(item, f"{place}.{number}")


def pin_revisions(plan: Plan, revisions: list[Revision]) -> Plan:
    """The plan with commits in the place of what the recipe says, where it still says what it did."""
    commits = {one.place: one for one in revisions}
    model, pinned = plan.model, commits.get(MODEL_STEP)
    if pinned is not None and model.id is not None and model.revision == pinned.asked:
        model = model.model_copy(update={"revision": pinned.commit})
    steps = [replace(step, stage=_pin(step.stage, step.id, commits)) for step in plan.steps]
    return replace(plan, model=model, steps=steps)


def _pin(value: Any, place: str, commits: Mapping[str, Revision]) -> Any:
    if isinstance(value, DatasetSource) and place in commits and value.revision == commits[place].asked:
        return value.model_copy(update={"revision": commits[place].commit})
    if isinstance(value, BaseModel):
        changed, fields = {}, type(value).model_fields
        for name, before in value:
            after = _pin(before, f"{place}.{fields[name].alias or name}", commits)
            if after is not before:
                changed[name] = after
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, tuple):
        items = tuple(_pin(item, f"{place}.{number}", commits) for number, item in enumerate(value))
        return items if any(one is not other for one, other in zip(items, value, strict=True)) else value
    return value
