"""Values that are used instead of the checkpoint's lie in files, and come back with their layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gradmap_plugins.project_compensate import ProjectCompensate
from safetensors.torch import save_file
from walk import make_calibration

from gradmap_pipeline import ModelGraph, correct_site, open_streams, sites_of, write_patches
from gradmap_pipeline.checkpoint.checkpoint import StoredTensor, read_header
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.overrides import Overrides
from gradmap_pipeline.testing import make_context, run_stage

DOWN, UP = "mlp.down_proj.weight", "mlp.up_proj.weight"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> LayerwiseModel:
    opened = LayerwiseModel(open_folder(llama), resident_bytes=0)
    opened.weights.overrides.use_folder(tmp_path)
    return opened


def value_of(model: LayerwiseModel, parameter: str, layer: int = 1) -> torch.Tensor:
    with model.layer(layer) as module:
        return module.get_parameter(parameter).detach().clone()


@pytest.mark.parametrize("is_resident", [False, True])
def test_what_is_set_aside_comes_back_with_its_layer(model: LayerwiseModel, is_resident: bool) -> None:
    weights, original = model.weights, value_of(model, DOWN)
    weights.is_resident = is_resident
    ones, twos, up = torch.ones_like(original), torch.full_like(original, 2), 2 * value_of(model, UP)
    weights.override(1, DOWN, ones)
    weights.override(1, UP, up)
    with weights.set_aside(1, "mlp.down_proj."):
        assert torch.equal(value_of(model, DOWN), original)
        assert torch.equal(value_of(model, UP), up)
        weights.override(1, DOWN, twos)
        assert torch.equal(value_of(model, DOWN), twos)
    assert torch.equal(value_of(model, DOWN), ones)
    assert torch.equal(value_of(model, UP), up)
    weights.restore(1)
    assert torch.equal(value_of(model, DOWN), original)
    assert torch.equal(value_of(model, UP), up / 2)


def test_what_was_not_overridden_is_so_again(model: LayerwiseModel) -> None:
    original = value_of(model, DOWN)
    with model.weights.set_aside(1, "mlp."):
        model.weights.override(1, DOWN, torch.zeros_like(original))
    assert not model.weights.overrides.has(1)
    assert torch.equal(value_of(model, DOWN), original)


def test_room_in_the_file_is_used_again(tmp_path: Path) -> None:
    overrides = Overrides()
    overrides.use_folder(tmp_path)
    for number in range(5):
        overrides.put(0, "a", torch.full((1000,), float(number)))
        overrides.put(1, "a", torch.full((1000,), 10.0 + number))
        with overrides.set_aside(1, "a"):
            overrides.put(1, "a", torch.zeros(1000))
    assert [value[0].item() for layer in (0, 1) for _, value in overrides.read(layer)] == [4, 14]
    assert overrides._file.bytes_written == 15 * 4000
    assert overrides._file._end <= 4 * 4000


def test_value_that_lies_in_a_file_is_read_from_there(model: LayerwiseModel, tmp_path: Path) -> None:
    """In the type of that file, whatever the layer has."""
    value = (torch.randn(value_of(model, DOWN).shape) * 100).to(torch.bfloat16)
    save_file({"w": value}, tmp_path / "w.safetensors")
    stored: StoredTensor = read_header(tmp_path / "w.safetensors")["w"]
    model.weights.override(1, DOWN, value, stored)
    model.weights.drop(1)
    assert torch.equal(value_of(model, DOWN), value.float())
    assert model.weights.overrides._file.bytes_written == 0


def test_correction_holds_none_of_its_values(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be as large as a good part of the model."""
    kept: list[tuple[int, str]] = []
    put = Overrides.put

    def look(overrides: Overrides, layer: int, parameter: str, value: torch.Tensor | StoredTensor) -> None:
        assert isinstance(value, StoredTensor)
        assert value.file.exists()
        put(overrides, layer, parameter, value)
        kept.append((layer, parameter))

    monkeypatch.setattr(Overrides, "put", look)
    graph: ModelGraph = open_folder(llama)
    calibration = make_calibration(graph, tmp_path / "calibration")
    result = run_stage(ProjectCompensate(), tmp_path / "step", model=graph.without_layers({1}), calibration=calibration)
    assert [layer for layer, parameter in kept if parameter == DOWN] == [0, 2, 3]
    assert len(kept) == len(result.compensation.sites)


@pytest.mark.parametrize("is_resident", [False, True])
def test_a_weight_that_is_corrected_twice_is_used_as_it_is_last(llama: Path, tmp_path: Path, is_resident: bool) -> None:
    """The second time it lies in the file that the first is read from."""
    graph = open_folder(llama)
    calibration, context = make_calibration(graph, tmp_path / "calibration"), make_context(tmp_path / "step")
    streams = open_streams(graph.without_layers({1}), calibration, context, 0)
    pruned = streams.pruned
    pruned.model.weights.is_resident = is_resident
    write_patches(streams, 0, {DOWN: value_of(pruned.model, DOWN, 0) / 2}, context)
    (site,) = (site for site in sites_of(streams, 0, {}) if site.role == "output")
    correct_site(streams, 0, site, context, space="input", ridge=0.1)
    pruned.run_up_to(2)
    kept = pruned.boundary(1, 0).clone()
    pruned.invalidate_from(0)
    pruned.run_up_to(2)
    torch.testing.assert_close(kept, pruned.boundary(1, 0), rtol=1e-5, atol=1e-6)
