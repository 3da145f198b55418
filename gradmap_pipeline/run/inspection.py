"""Ask every stage of a plan whether it can work on the model, before any step runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..checkpoint.graph import ModelGraph, open_folder
from ..errors import GradmapError, OptionError
from ..machine.distributed import ProcessGroup
from ..machine.machine import Machine
from ..machine.memory import default_budget, give_back, resident_bytes
from ..recipe.asking import ask
from ..recipe.plan import Plan, PlannedStep
from ..stages.structure_probe import Room, StructureProbe


def inspect_plan(plan: Plan, answers: dict[str, Any]) -> bool:
    """Ask the stages of all steps where the model is on this machine; return whether there was memory to try all that they ask.

    `answers`: as of `StructureProbe`. Raises as `inspect_steps`; no tensor is read.
    """
    folder = plan.model.find_folder()
    if folder is None:
        return False
    graph, memory = open_folder(folder, plan.model.name, plan.model.dtype, digest_of=lambda _: ""), default_budget("cpu")
    inspect_steps(plan.steps, graph, memory, answers=answers)
    return StructureProbe(graph, memory).tries_all


def inspect_steps(
    steps: Sequence[PlannedStep], model: ModelGraph, memory: int, room: Room | None = None, answers: dict[str, Any] | None = None
) -> None:
    """Raise the first refusal, with the step it comes from.

    `memory`: bytes that may be used for it; `room`: what the steps may use; `answers`: as of `StructureProbe`.
    """
    probe = StructureProbe(model, memory, room, answers)
    try:
        probe.check_loadable()
    except GradmapError as error:
        error.where = error.where or f"model {model.base.name!r}"
        raise
    for step in steps:
        probe.room = room if room is None or step.environment is None else replace(room, processes=1)  # one runs elsewhere
        _inspect(step, probe)
    del probe
    give_back()


def measure_room(machine: Machine, group: ProcessGroup) -> Room:
    """What the steps of a run may use on its device."""
    device = machine.prepare_torch(group)
    return Room(group.least(machine.budget(device, group) - resident_bytes(device)), machine.dtype, group.size)


def _inspect(step: PlannedStep, probe: StructureProbe) -> None:
    where = f"step {step.id!r}"
    try:
        ask("inspect", step.stage, step.id, step.plugin, step.known, probe)
    except GradmapError as error:
        if isinstance(error, OptionError):
            override = step.overrides.get(error.option.partition(".")[0])
            where += f", option {error.option!r}{f' ({override})' if override else ''}"
        error.where = error.where or where
        raise
