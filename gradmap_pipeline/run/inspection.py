"""Ask every stage of a plan whether it can work on the model, before any step runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint.graph import ModelGraph, open_folder
from ..errors import GradmapError, OptionError
from ..machine.distributed import ProcessGroup
from ..machine.machine import Machine
from ..machine.memory import default_budget, give_back, resident_bytes
from ..recipe.asking import ask
from ..recipe.plan import Plan, PlannedStep
from ..stages.structure_probe import Room, StructureProbe


def inspect_plan(plan: Plan) -> None:
    """Ask the stages of all steps where the model is on this machine. Raises as `inspect_steps`; no tensor is read."""
    folder = plan.model.find_folder()
    if folder is not None:
        graph = open_folder(folder, plan.model.name, plan.model.dtype, digest_of=lambda _: "")
        inspect_steps(plan.steps, graph, default_budget("cpu"))


def inspect_steps(steps: Sequence[PlannedStep], model: ModelGraph, memory: int, room: Room | None = None) -> None:
    """Raise the first refusal, with the step it comes from. `memory`: bytes that may be used for it; `room`: for the steps."""
    probe = StructureProbe(model, memory, room)
    try:
        probe.check_loadable()
    except GradmapError as error:
        error.where = error.where or f"model {model.base.name!r}"
        raise
    for step in steps:
        _inspect(step, probe)
    del probe
    give_back()


def measure_room(machine: Machine, group: ProcessGroup) -> Room:
    """What the steps of a run may use on its device."""
    device = machine.prepare_torch(group)
    return Room(group.least(machine.budget(device, group) - resident_bytes(device)), machine.dtype)


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
