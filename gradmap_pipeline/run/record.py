"""What a run came to, as JSON that `gradmap log`, `show`, `diff` and `report` read. It rests on what the steps gave."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint.graph import ModelGraph
from ..export.folders import describe_base
from ..machine.distributed import ProcessGroup
from ..machine.machine import Machine
from ..recipe.plan import Plan
from ..sweep.memory_plan import format_size
from .events import Place
from .provenance import describe_surroundings
from .store import Store
from .summary import summarise

if TYPE_CHECKING:
    from .runner import RunState


def make_head(plan: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """The few fields of a record that a list of runs shows."""
    models = record.get("models") or []
    last = next((row for row in reversed(models) if row["metrics"]), models[-1] if models else None)
    head: dict[str, Any] = {
        "recipe": str(plan.recipe_path),
        "recipe_path": str(plan.recipe_path.resolve()),
        "description": plan.description,
        "model": plan.model.name,
        "steps": len(plan.steps),
    }
    if "steps" in record:
        head["steps_done"] = len(record["steps"])
    if last is None:
        return head
    metrics = {column: metric["value"] for column, metric in last["metrics"].items()}
    return {**head, "base_layers": models[0]["layers"], "layers": last["layers"], "label": last["label"], "metrics": metrics}


def make_record(plan: Plan, machine: Machine, state: RunState | None, seconds: float, failure: str = "") -> dict[str, Any]:
    """The run as plain values, as far as it has come.

    `state`: where it stands; None before its model is known. `failure`: why it was stopped; empty where it was not.
    """
    record: dict[str, Any] = {
        "made_by": f"gradmap-pipeline {__version__}",
        "recipe": plan.recipe_text,
        "recipe_name": plan.recipe_path.name,
        "overrides": list(plan.overrides),
        "model": plan.model.model_dump(mode="json", exclude_none=True),
        "planned": [
            {
                "id": step.id,
                "stage": step.stage.name,
                "inputs": {name: ".".join(source) for name, source in step.inputs.items()},
                "options": step.stage.model_dump(mode="json", by_alias=True),
            }
            for step in plan.steps
        ],
        "failure": failure,
        "ended_at": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": seconds,
        "machine": _describe_machine(plan, machine, None if state is None else state.place),
    }
    if state is None:
        return record
    base = state.outputs["model"]["model"]
    assert isinstance(base, ModelGraph)
    device, threads = (state.place.device, state.place.threads) if state.place else (None, None)
    surroundings = describe_surroundings(plan, machine, base, device, threads)
    models = summarise(state.outputs, state.measured, state.finished).models
    graphs = [one for given in state.outputs.values() for one in given.values() if isinstance(one, ModelGraph)]
    stages = {step.id: step.stage for step in plan.steps}
    return {
        **record,
        "versions": {"python": platform.python_version(), **surroundings["libraries"]},
        "base": describe_base(base),
        "provenance": {**surroundings, "steps": list(state.described.values())},
        "kept": list(models[-1].kept),
        "patched": list(graphs[-1].patches),
        "models": [{**vars(row), "metrics": {name: one.model_dump() for name, one in row.metrics.items()}} for row in models],
        "steps": [
            {
                "id": step.step,
                "stage": step.stage,
                "key": state.keys.get(step.step, ""),
                "options": stages[step.step].model_dump(mode="json", by_alias=True),
                "outputs": {name: artifact.content() for name, artifact in state.outputs.get(step.step, {}).items()},
                "seconds": step.computed_seconds,
                "seconds_here": step.seconds,
                "peak_bytes": step.peak_bytes,
                "cached": step.cached,
            }
            for step in state.finished
        ],
        "limits": [{**vars(limit), "step": step.step} for step in state.finished for limit in step.limits],
    }


def describe_place(plan: Plan, store: Store, machine: Machine, group: ProcessGroup) -> Place:
    """What a run starts from, and where it computes."""
    device = machine.prepare_torch(group)
    import torch

    threads, memory = torch.get_num_threads(), machine.budget(device, group)
    return Place(plan.model.name, device, machine.dtype, threads, memory, str(store.root), group.size)


def _describe_machine(plan: Plan, machine: Machine, place: Place | None) -> dict[str, str]:
    device = machine.device if place is None else place.device
    described = {"system": platform.platform(), "device": device, "computed in": machine.dtype, "seed": str(plan.seed)}
    threads = machine.threads if place is None else place.threads
    if threads is not None:
        described["threads"] = str(threads)
    if place is not None and place.processes > 1:
        described["processes"] = str(place.processes)
    if machine.memory is not None:
        described["memory allowed"] = format_size(machine.memory)
    return described
