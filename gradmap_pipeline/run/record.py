"""What a run came to, as JSON that `gradmap report` reads. It rests on what the steps gave; nothing is computed for it."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__
from ..artifacts import Artifact
from ..checkpoint.graph import ModelGraph
from ..export.folders import describe_base
from ..machine.distributed import ProcessGroup
from ..machine.machine import Machine
from ..recipe.plan import Plan
from ..sweep.memory_plan import format_size
from .events import Place, RunFinished, StepFinished
from .store import Store

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def make_record(
    plan: Plan,
    machine: Machine,
    base: ModelGraph,
    outputs: dict[str, dict[str, Artifact]],
    finished: list[StepFinished],
    ended: RunFinished,
    failure: str = "",
) -> dict[str, Any]:
    """The run as plain values. `failure`: why it was stopped; empty where it reached its end."""
    models = ended.summary.models
    graphs = [one for given in outputs.values() for one in given.values() if isinstance(one, ModelGraph)]
    stages = {step.id: step.stage for step in plan.steps}
    return {
        "made_by": f"gradmap-pipeline {__version__}",
        "recipe": plan.recipe_text,
        "recipe_name": plan.recipe_path.name,
        "overrides": list(plan.overrides),
        "failure": failure,
        "ended_at": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": ended.seconds,
        "versions": {"python": platform.python_version(), **{library: _version(library) for library in _LIBRARIES}},
        "machine": _describe_machine(plan, machine),
        "base": describe_base(base),
        "kept": list(models[-1].kept),
        "patched": list(graphs[-1].patches),
        "models": [{**vars(row), "metrics": {name: one.model_dump() for name, one in row.metrics.items()}} for row in models],
        "steps": [
            {
                "id": step.step,
                "stage": step.stage,
                "options": stages[step.step].model_dump(mode="json", by_alias=True),
                "outputs": {name: artifact.content() for name, artifact in outputs.get(step.step, {}).items()},
                "seconds": step.computed_seconds,
                "peak_bytes": step.peak_bytes,
                "cached": step.cached,
            }
            for step in finished
        ],
        "limits": [{**vars(limit), "step": step.step} for step in finished for limit in step.limits],
    }


def describe_place(plan: Plan, store: Store, machine: Machine, group: ProcessGroup) -> Place:
    """What a run starts from, and where it computes."""
    device = machine.prepare_torch(group)
    import torch

    threads, memory = torch.get_num_threads(), machine.budget(device, group)
    return Place(plan.model.name, device, machine.dtype, threads, memory, str(store.root), group.size)


def _describe_machine(plan: Plan, machine: Machine) -> dict[str, str]:
    described = {"system": platform.platform(), "device": machine.device, "computed in": machine.dtype, "seed": str(plan.seed)}
    if machine.threads is not None:
        described["threads"] = str(machine.threads)
    if machine.memory is not None:
        described["memory allowed"] = format_size(machine.memory)
    return described


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"
