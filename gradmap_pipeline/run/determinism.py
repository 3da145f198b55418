"""Run a step once more and compare what it gives, to the bit: `gradmap run --verify-determinism`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..artifacts import LINEAGE, PAGE, Artifact, TensorFile
from ..errors import DifferenceError
from ..export.exports import Export
from ..machine.memory import give_back
from ..recipe.plan import PlannedStep
from .stage_call import scratch_step
from .step_run import StepCall

_TIMES = ("seconds", "saved", "elapsed")
"""Fields of artifacts that hold times."""


def verify_step(call: StepCall, first: BaseModel, *, is_leading: bool) -> None:
    """Run a step into a folder that is thrown away. Raises `DifferenceError`, with the artifact and the tensor, where it gives
    something else than `first`. Stages whose results hold for one machine alone, as times do, are left out.
    """
    step = call.step
    if getattr(step.stage, "machine_bound", False):
        return
    with scratch_step() as folder:
        again = replace(call, step=_write_into(step, folder.path / "written"))
        (folder.path / "step").mkdir()
        second = again.run_anew(replace(folder, path=folder.path / "step"))
        difference = next(_find_differences(first, second), None) if is_leading else None
    give_back(between_steps=True)
    if difference is not None:
        error = DifferenceError(f"stage {step.stage.name!r} gave something else when it ran once more: {difference}")
        error.where = f"step {step.id!r}"
        raise error
    if is_leading:
        call.reporter.note(step.id, "ran once more, and gave the same to the bit")


def _write_into(step: PlannedStep, folder: Path) -> PlannedStep:
    """A step that writes its folders elsewhere, under the same names."""
    moved = {name: folder / value.name for name, value in step.stage if isinstance(value, Path) and value in step.writes}
    if not moved:
        return step
    stage = step.stage.model_copy(update=moved)
    return replace(step, stage=stage, writes=tuple(moved.values()))


def _find_differences(first: BaseModel, second: BaseModel) -> Iterator[str]:
    """Where outputs differ, in their order."""
    for name in type(first).model_fields:
        one, other = getattr(first, name), getattr(second, name, None)
        if isinstance(one, Artifact) and isinstance(other, Artifact):
            yield from (f"output {name!r}, {line}" for line in _compare_artifacts(one, other))
        elif (one is None) != (other is None):
            yield f"output {name!r} was made {'the second' if one is None else 'the first'} time alone"


def _compare_artifacts(one: Artifact, other: Artifact) -> Iterator[str]:
    if isinstance(one, Export) and isinstance(other, Export):
        names = {*one.files, *other.files} - {LINEAGE, PAGE}  # the one holds times and places, the other is made from it
        for name in sorted(names):
            before, after = one.files.get(name), other.files.get(name)
            if before != after:
                tensor = _compare_tensors(one.folder / name, other.folder / name) if name.endswith(".safetensors") else None
                yield f"file {name!r}{'' if tensor is None else f', {tensor}'}"
        one, other = one.graph, other.graph
    yield from _compare_values(_plain(one), _plain(other), "")


def _plain(value: Any) -> Any:
    """Models as mappings of their fields, but for places and times; files of tensors as they are."""
    if isinstance(value, TensorFile):
        return value
    if isinstance(value, BaseModel):
        names = [name for name in type(value).model_fields if name not in _TIMES]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key not in _TIMES}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _compare_values(one: Any, other: Any, place: str) -> Iterator[str]:
    if isinstance(one, TensorFile) and isinstance(other, TensorFile):
        if one.sha256 != other.sha256:
            yield f"{place}: {_compare_tensors(one.path, other.path) or 'the file differs, and no tensor in it'}"
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from _compare_values(one.get(key), other.get(key), f"{place}.{key}" if place else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _compare_values(*pair, f"{place}.{number}")
    elif isinstance(one, Path) and isinstance(other, Path):
        return
    elif one != other:
        yield f"{place}: {_shorten(one)}, then {_shorten(other)}"


def _compare_tensors(one: Path, other: Path) -> str | None:
    """The first tensor that differs between two files, and by how much; None where none does."""
    import torch
    from safetensors import safe_open

    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        names = set(second.keys())
        for name in first.keys():  # noqa: SIM118 - it is no mapping
            if name not in names:
                return f"tensor {name!r} is missing the second time"
            before, after = first.get_tensor(name), second.get_tensor(name)
            if before.dtype != after.dtype or before.shape != after.shape:
                return f"tensor {name!r} is {tuple(before.shape)} {before.dtype}, then {tuple(after.shape)} {after.dtype}"
            flat = [tensor.contiguous().view(-1).view(torch.uint8).view(tensor.numel(), -1) for tensor in (before, after)]
            differing = int((flat[0] != flat[1]).any(-1).sum()) if before.numel() else 0
            if differing:
                apart = ""
                with suppress(RuntimeError):
                    apart = f", by up to {float((before.double() - after.double()).abs().max()):.2g}"
                return f"tensor {name!r} differs in {differing:,} of {before.numel():,} values{apart}"
        extra = names - set(first.keys())
    return f"tensor {min(extra)!r} came the second time" if extra else None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
