"""Ask every stage of a plan whether it can work on the model, before any step runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint.graph import ModelGraph, open_folder
from ..errors import GradmapError, OptionError
from ..machine.memory import default_budget, give_back
from ..recipe.asking import ask
from ..recipe.plan import Plan, PlannedStep
from ..stages.structure_probe import StructureProbe


def inspect_plan(plan: Plan) -> None:
    """Ask the stages of all steps where the model is on this machine. Raises as `inspect_steps`; no tensor is read."""
    folder = plan.model.find_folder()
    if folder is not None:
        graph = open_folder(folder, plan.model.name, plan.model.dtype, digest_of=lambda _: "")
        inspect_steps(plan.steps, graph, default_budget("cpu"))


def inspect_steps(steps: Sequence[PlannedStep], model: ModelGraph, memory: int) -> None:
    """Raise the first refusal, with the step it comes from. `memory`: bytes that may be used for it."""
    probe = StructureProbe(model, memory)
    try:
        probe.check_loadable()
    except GradmapError as error:
        error.where = error.where or f"model {model.base.name!r}"
        raise
    for step in steps:
        _inspect(step, probe)
    del probe
    give_back()


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
