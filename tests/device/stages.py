"""Every stage that computes gives on the device what it gives on the CPU, and leaves nothing there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from tiny import make_model, make_text

from gradmap_pipeline import ModelGraph, Stage
from gradmap_pipeline.artifacts import TensorFile
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.errors import CapacityError
from gradmap_pipeline.machine.accelerators import module_of
from gradmap_pipeline.machine.memory import resident_bytes
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.sweep import memory_plan
from gradmap_pipeline.testing import make_context

REMOVED = (1, 2)
TOLERANCE = 2e-3
"""Relative to the largest number of a tensor, and of numbers: attention is computed in another order."""
UNRELATED = {"seconds", "saved", "sha256", "path", "work", "digest", "model", "folder"}
"""Times, and digests of files that differ in the last bits."""
MUCH = 1 << 32


@dataclass(frozen=True)
class Case:
    """One stage with options."""

    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    on: str = "dense"
    """Which model it takes: `dense` or `pruned`."""
    architecture: str = "llama"
    is_tight: bool = False
    """Whether it gets as little memory on the device as it runs with."""


FEW: dict[str, Any] = {"layers": 1, "protect_first": 0, "protect_last": 0}
CASES = {
    "gate gradient": Case("gradmap_score", FEW),
    "gate gradient, tight": Case("gradmap_score", {**FEW, "layers": 2}, is_tight=True),
    "update gradient": Case("gradmap_score", {**FEW, "metric": "update_gradient"}),
    "weight gradient": Case("gradmap_score", {**FEW, "metric": "weight_gradient"}),
    "weight gradient, tight": Case("gradmap_score", {**FEW, "metric": "weight_gradient"}, is_tight=True),
    "taylor": Case("taylor_score", FEW),
    "shortgpt": Case("shortgpt_score", FEW),
    "shortgpt, tight": Case("shortgpt_score", FEW, is_tight=True),
    "angular": Case("angular_score", {**FEW, "tokens": "all"}),
    "angular, last tokens": Case("angular_score", FEW),
    "sleb": Case("sleb_score", FEW),
    "sleb, tight": Case("sleb_score", FEW, is_tight=True),
    "perplexity": Case("perplexity_score", FEW),
    "magnitude": Case("magnitude_score", FEW),
    "random": Case("random_score", FEW),
    "last layers": Case("last_layers_score", {"layers": 1}),
    "evaluate": Case("evaluate"),
    "evaluate, tight": Case("evaluate", is_tight=True),
    "prune": Case("prune", {"layers": [1]}),
    "correction": Case("project_compensate", on="pruned"),
    "correction, output": Case("project_compensate", {"space": "output"}, on="pruned"),
    "correction, attention, tight": Case("project_compensate", {"attention": True}, on="pruned", is_tight=True),
    "mean bias": Case("mean_bias", on="pruned", architecture="opt"),
    "replaceme": Case("replaceme_compensate", on="pruned"),
    "linearpatch": Case("linearpatch_compensate", on="pruned"),
    "merge": Case("mka_merge", {"layers": 1}),
    "export": Case("export", on="pruned"),
    "windows and eager attention": Case("gradmap_score", FEW, architecture="gemma2"),
    "experts, tight": Case("gradmap_score", FEW, architecture="mixtral", is_tight=True),
    "learned positions": Case("gradmap_score", FEW, architecture="gpt2"),
}


def make_device_context(device: str, folder: Path, room: int) -> Any:
    return replace(make_context(folder, memory=resident_bytes(device) + room), device=device)


def find_least(stage: Stage, device: str, folder: Path, inputs: Any) -> int:
    """The least memory on the device with which a stage runs, to a quarter."""
    fits, fails = 1 << 24, 0
    while fits - fails > fits // 4:
        middle = (fits + fails) // 2
        try:
            stage.run(inputs, make_device_context(device, folder / str(middle), middle))
            fits = middle
        except CapacityError:
            fails = middle
    return fits


def numbers_in(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, words and tensors of an artifact, with their places."""
    if isinstance(value, TensorFile):
        for name, tensor in value.load().items():
            yield f"{place}.{name}", tensor
    elif isinstance(value, ModelGraph):
        yield f"{place}.layers", value.layers
        yield from numbers_in(value.patches, f"{place}.patches")
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            if name not in UNRELATED:
                yield from numbers_in(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from numbers_in(part, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from numbers_in(part, f"{place}.{number}")
    elif not isinstance(value, Path):
        yield place, value


def find_difference(one: Any, other: Any) -> str:
    """What differs between two results, in one line; empty where they are equal to the tolerance."""
    left, right = dict(numbers_in(one)), dict(numbers_in(other))
    if left.keys() != right.keys():
        return f"places differ: {sorted(left.keys() ^ right.keys())[:5]}"
    for place, value in left.items():
        against = right[place]
        if isinstance(value, torch.Tensor):
            far = float((value.double() - against.double()).abs().max() / value.double().abs().max().clamp_min(1e-12))
        elif isinstance(value, float):
            far = abs(value - against) / max(abs(value), 1e-3)
        else:
            far = float(value != against)
        if not far <= TOLERANCE:
            return f"{place}: {value} on the CPU, {against} on the device"
    return ""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize("name", CASES)
def test_a_stage_gives_what_it_gives_on_the_cpu(
    name: str, device: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "_SLACK", 0)  # larger than these models
    case = CASES[name]
    graph = open_folder(make_model(tmp_path / "model", case.architecture))
    stages = load_catalog().stages
    drawing: dict[str, Any] = {"dataset": {"path": str(text)}, "samples": 12, "sequence_length": 24}
    needed = {"evaluate": drawing, "export": {"to": str(tmp_path / "out")}}
    cls = stages[case.stage]
    stage = cls(**case.options, **needed.get(case.stage, {}))
    drawn = stages["calibrate"](**drawing)
    calibration = drawn.run(type(drawn).Inputs(model=graph), make_context(tmp_path / "calibrate")).calibration
    given = {"model": graph.without_layers(REMOVED) if case.on == "pruned" else graph, "calibration": calibration}
    inputs = cls.Inputs.model_validate({name: value for name, value in given.items() if name in cls.input_fields()})

    expected = stage.run(inputs, make_context(tmp_path / "cpu"))
    if (tmp_path / "out").exists():
        (tmp_path / "out").rename(tmp_path / "out-cpu")
    room = find_least(stage, device, tmp_path / "least", inputs) if case.is_tight else MUCH
    gc.collect()
    before = module_of(device).memory_allocated(device)
    found = stage.run(inputs, make_device_context(device, tmp_path / "device", room))
    assert find_difference(expected, found) == ""
    gc.collect()
    assert module_of(device).memory_allocated(device) <= before
