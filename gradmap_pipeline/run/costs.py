"""What the steps of a plan would take on this machine."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.graph import ModelGraph
from ..cost.estimate import Estimate
from ..cost.model_costs import ModelCosts
from ..cost.narrow_types import tell_slow_type
from ..errors import CapacityError, GradmapError, ModelError, first_line
from ..machine.machine import Machine
from ..machine.memory_advice import tell_shortage
from ..machine.shortages import find_shortage
from ..recipe.asking import ask
from ..recipe.plan import Plan, PlannedStep
from ..recipe.recipe import MODEL_STEP
from ..stages.forecasts import Forecasts
from ..sweep.memory_plan import format_size
from ..text import join_words
from .inspection import inspect_steps

_ENOUGH = 0.75
"""Share of the threads that must find a core for times to be those of an idle machine."""
_LOOKED = 0.2  # seconds


@dataclass(frozen=True)
class StepCost:
    """One step."""

    step: str
    parameters: int | None
    """Parameters of the model that the step makes, where it makes one."""
    estimate: Estimate | None
    """None: the stage does not say."""
    obstacle: str | None = None
    """Why the step does not fit this machine."""
    enough: int | None = None
    """Bytes to allow with --memory that suffice as far as is known, where it does not fit the memory."""


@dataclass(frozen=True)
class PlanCosts:
    """All steps, the opening of the model first."""

    memory: int
    """Bytes the process may have resident."""
    steps: list[StepCost]
    threads: int = 1
    """That a run would compute with."""
    cores: int = 1
    busy_cores: float = 0.0
    """That other programs used when times were measured."""
    slow_type: str | None = None
    """The warning of `tell_slow_type`, where there is one."""

    @property
    def is_disturbed(self) -> bool:
        """Other programs leave too few cores for a run, so times are longer than on an idle machine."""
        return self.cores - self.busy_cores < _ENOUGH * min(self.threads, self.cores)

    @property
    def total(self) -> Estimate:
        return sum((step.estimate for step in self.steps if step.estimate), Estimate())

    @property
    def obstacles(self) -> list[str]:
        """Why steps do not fit, a line each; of those that need more memory, one line tells what the largest needs."""
        lines = [f"step {step.step!r}: {step.obstacle}" for step in self.steps if step.obstacle and step.enough is None]
        short = [step for step in self.steps if step.enough is not None]
        if not short:
            return lines
        largest = max(short, key=lambda step: step.enough or 0)
        names = join_words([repr(step.step) for step in short])
        most = f"steps {names} need more memory; most of all {largest.step!r}" if len(short) > 1 else f"step {names}"
        return [f"{most}: {largest.obstacle}", *lines]


def estimate_plan(plan: Plan, machine: Machine, store: Path) -> PlanCosts | None:
    """Ask each stage what it would take; None where the model is not on this machine.

    Raises `CapacityError` when no step could run. Loads no tensor; takes a few seconds to try one layer.
    """
    folder = plan.model.find_folder()
    if folder is None:
        return None
    try:
        costs = ModelCosts(folder, plan.model.name, plan.model.dtype, machine, store)
    except (GradmapError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise _explain(error, f"model {plan.model.name!r} cannot be tried") from error
    inspect_steps(plan.steps, costs.graph, costs.memory)
    load = _measure_load() if costs.device == "cpu" else {}
    stored = costs.stored_layer_bytes + costs.stored_rest_bytes
    seconds = stored * (costs.speed.digest + costs.speed.read)
    depth = len(costs.graph.layers)
    steps = [StepCost(MODEL_STEP, costs.count_parameters(depth), Estimate(bytes_read=stored, seconds=seconds))]
    starting = costs.start_seconds
    for step in plan.steps:
        made = getattr(step.forecasts.get("model"), "layers", None)
        parameters = None if made is None else costs.count_parameters(made)
        try:
            estimate: Estimate | None = ask("estimate", step.stage, step.id, step.plugin, step.known, costs)
            if step.measured is not None and any(limit.is_relative for limit in step.limits.values()):
                at_base = {**step.known, step.measured: plan.model_forecast}
                whole = Forecasts(type(step.stage), {step.measured: ModelGraph}, **at_base)
                other: Estimate | None = ask("estimate", step.stage, step.id, step.plugin, whole, costs)
                estimate = estimate + other if estimate is not None and other is not None else None
        except CapacityError as error:
            told = tell_shortage(error, type(step.stage).model_fields)
            steps.append(StepCost(step.id, parameters, None, told, error.enough))
            continue
        obstacle = None if estimate is None else _find_full_disk(step, estimate, store)
        if estimate is not None and estimate.seconds:
            estimate, starting = replace(estimate, seconds=estimate.seconds + starting), 0.0
        steps.append(StepCost(step.id, parameters, estimate, obstacle))
    return PlanCosts(costs.memory, steps, **load, slow_type=tell_slow_type(costs.device, machine.dtype))


def _measure_load() -> dict[str, Any]:
    """Threads of this process, cores, and how many of these other programs use while this one waits."""
    import psutil
    import torch

    cores = os.cpu_count() or 1
    return {"threads": torch.get_num_threads(), "cores": cores, "busy_cores": psutil.cpu_percent(_LOOKED) / 100 * cores}


def _find_full_disk(step: PlannedStep, estimate: Estimate, store: Path) -> str | None:
    """Why what a step writes does not fit its disk: that of the folder it makes, else that of the store."""
    place, needed = (step.writes[0], estimate.bytes_written) if step.writes else (store, estimate.disk_bytes)
    above = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(above).free
    if needed <= free:
        return None
    need = "what it writes needs" if step.writes else "what it keeps in files for its own time needs"
    elsewhere = "name another disk with --store; with fewer samples, or more with --memory, fewer hidden states lie there"
    advice = "name a folder on another disk" if step.writes else elsewhere
    return f"{need} {format_size(needed)}, and {str(above)!r} has {format_size(free)} free; {advice}"


def _explain(error: BaseException, context: str) -> GradmapError:
    """One line for an error that nobody foresaw."""
    shortage = find_shortage(error)
    if shortage is not None:
        return CapacityError(f"{context}: {shortage.explain()}")
    return ModelError(f"{context}: {type(error).__name__}: {first_line(error)}")
