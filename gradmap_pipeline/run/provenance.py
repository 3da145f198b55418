"""What decides the bytes of a result, as JSON: of records, lock files and exports. And in words, where two of these differ."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.graph import ModelGraph
from ..checkpoint.source import ModelSource
from ..machine.machine import Machine
from ..recipe.plan import Plan, PlannedStep
from ..text import name_without_place
from .keys import fingerprint_options, version_of, versions_of
from .store import Store
from .workplaces import workplace_of

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
_OURS = "gradmap-pipeline"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def describe_step(step: PlannedStep, store: Store) -> dict[str, Any]:
    """Stage, code, inputs and options of a step. Data count by digest or revision; where it writes is left out."""
    workplace = workplace_of(step, store)
    written = {name for name, value in step.stage if isinstance(value, Path) and value in step.writes}
    options = {name: value for name, value in fingerprint_options(step, store).items() if name not in written}
    described = {
        "id": step.id,
        "stage": step.stage.name,
        "plugin": name_plugin(step),
        "code": step.code.digest,
        "inputs": {name: ".".join(source) for name, source in step.inputs.items()},
        "options": options,
    }
    return described if workplace is None else {**described, "python": versions_of(step, workplace)}


def name_plugin(step: PlannedStep) -> str:
    """What installs a step's stage, with its version; of a single file, its name."""
    if step.code.folder is not None:
        return Path(step.plugin).name
    return step.code.distribution or f"{_OURS} {__version__}"


def describe_model(source: ModelSource, base: ModelGraph) -> dict[str, Any]:
    """The model that a recipe starts from: its name, the commit of a hub model, and the digest of its files."""
    place = {"id": source.id} if source.id else {"builtin": source.builtin} if source.builtin else {"path": str(source.path)}
    folder = base.base.folder
    commit = folder.name if source.id and folder.parent.name == "snapshots" else None
    place = {name: name_without_place(str(value)) for name, value in place.items()}
    return {**place, **({"revision": commit or source.revision} if source.id else {}), "sha256": base.base.sha256}


def describe_surroundings(
    plan: Plan, machine: Machine, base: ModelGraph, device: str | None, threads: int | None
) -> dict[str, Any]:
    """All besides the steps: Python, libraries, model, and how is computed.

    `device` and `threads`: as torch has them; None where nothing was computed.
    """
    libraries = {*_LIBRARIES, *(name for step in plan.steps if step.environment is None for name in step.stage.libraries)}
    return {
        "made_by": f"{_OURS} {__version__}",
        "python": platform.python_version(),
        "libraries": {name: version_of(name) for name in sorted(libraries)},
        "model": {**describe_model(plan.model, base), "dtype": plan.model.dtype},
        "seed": plan.seed,
        "device": None if device is None else device.partition(":")[0],
        "dtype": machine.dtype,
        "threads": threads,
    }


def describe_run(plan: Plan, machine: Machine, base: ModelGraph, store: Store) -> dict[str, Any]:
    """All that decides the bytes of what a plan comes to, and the processor that computes."""
    import torch

    device = machine.prepare_torch()
    surroundings = describe_surroundings(plan, machine, base, device, torch.get_num_threads())
    steps = [describe_step(step, store) for step in plan.steps]
    return {**surroundings, "processor": name_processor(device), "steps": steps}


def name_processor(device: str) -> str:
    """The processor that computes, by name: floating-point sums may be ordered in another way on another one."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def find_differences(locked: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a description is another now, a sentence each, the surroundings first."""
    names = {"python": "Python", "seed": "the seed", "device": "the device", "dtype": "the compute type", "threads": "threads"}
    lines = [
        f"{name} {'are' if key == 'threads' else 'is'} {now.get(key)}, locked: {locked.get(key)}"
        for key, name in names.items()
        if now.get(key) != locked.get(key)
    ]
    lines += [f"library {line}" for line in _compare(_mapping(locked, "libraries"), _mapping(now, "libraries"))]
    lines += [f"the model: {line}" for line in _compare(_without_path(locked), _without_path(now))]
    before, after = _by_id(locked), _by_id(now)
    lines += [f"step {step!r} is not locked" for step in after if step not in before]
    lines += [f"step {step!r} is locked, and the recipe has none of that id" for step in before if step not in after]
    for step in after:
        if step in before:
            lines += [f"step {step!r}: {line}" for line in _compare_steps(before[step], after[step])]
    if not lines and list(before) != list(after):
        lines.append(f"the steps stand in the order {', '.join(after)}, locked: {', '.join(before)}")
    return lines


def explain_processor(locked: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What to say where another processor computes; None where it is the same."""
    if locked.get("processor") == now.get("processor"):
        return None
    told = f"the processor is {now.get('processor')!r}, and the lock was made on {locked.get('processor')!r}"
    return f"{told}: floating-point sums may come out otherwise"


def _compare_steps(locked: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if locked.get("stage") != now.get("stage"):
        yield f"the stage is {now.get('stage')!r}, locked: {locked.get('stage')!r}"
        return
    if locked.get("plugin") != now.get("plugin"):
        yield f"the plugin is {now.get('plugin')!r}, locked: {locked.get('plugin')!r}"
    elif locked.get("code") != now.get("code"):
        yield f"the code of its plugin, {now.get('plugin')!r}, is another ({_show(now.get('code'))}, {_was(locked.get('code'))})"
    yield from (f"input {line}" for line in _compare(_mapping(locked, "inputs"), _mapping(now, "inputs")))
    yield from (f"option {line}" for line in _compare(_mapping(locked, "options"), _mapping(now, "options")))
    yield from (f"its Python: {line}" for line in _compare(_mapping(locked, "python"), _mapping(now, "python")))


def _compare(locked: Mapping[Any, Any], now: Mapping[Any, Any]) -> Iterator[str]:
    """Values that differ, by name; of what stands inside each other, the innermost."""
    for name in dict.fromkeys([*locked, *now]):
        before, after = locked.get(name), now.get(name)
        if before == after:
            continue
        if isinstance(before, list) and isinstance(after, list) and len(before) == len(after) and not _is_content(before):
            before, after = dict(enumerate(before)), dict(enumerate(after))
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from (f"{name!r}: {line}" for line in _compare(before, after))
        elif _is_content(before) and _is_content(after):
            yield f"{name!r} holds other content ({_show(after)}, {_was(before)})"
        else:
            yield f"{name!r} is {_show(after)}, {_was(before)}"


def _is_content(value: Any) -> bool:
    """Whether a value is a digest, or a list of such."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return bool(items) and all(isinstance(item, str) and _DIGEST.fullmatch(item) for item in items)


def _was(value: Any) -> str:
    return f"locked: {_show(value)}"


def _show(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, str) and (_DIGEST.fullmatch(value) or _COMMIT.fullmatch(value)):
        return value[:12]
    return "not given" if value is None else str(value)


def _mapping(described: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = described.get(key)
    return value if isinstance(value, Mapping) else {}


def _without_path(described: Mapping[str, Any]) -> dict[str, Any]:
    """The model, wherever it lies."""
    return {key: value for key, value in _mapping(described, "model").items() if key != "path"}


def _by_id(described: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {str(step.get("id")): step for step in described.get("steps") or () if isinstance(step, Mapping)}
