"""A correction that goes up keeps the layer that it stands at, and comes to the same bytes as one that keeps all hidden states."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.linearpatch_compensate import LinearpatchCompensate
from gradmap_plugins.project_compensate import ProjectCompensate
from gradmap_plugins.refit_layers import RefitLayers
from gradmap_plugins.replaceme_compensate import ReplacemeCompensate
from safetensors.torch import load_file
from tiny import make_model

from gradmap_pipeline import (
    LayerCompensation,
    LayersLeft,
    ModelCosts,
    Site,
    StreamWork,
    find_writers,
    nearest_scale,
    open_streams,
    rescale_stream,
)
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.correction.streams import Streams
from gradmap_pipeline.errors import PluginError
from gradmap_pipeline.machine.machine import Machine
from gradmap_pipeline.sweep.kept_tensors import TAKEN, KeptTensors
from gradmap_pipeline.testing import run_stage

LAYERS = 6
WAYS: list[tuple[type[LayerCompensation], dict[str, Any]]] = [
    (ProjectCompensate, {}),
    (ProjectCompensate, {"attention": False}),
    (ProjectCompensate, {"space": "output"}),
    (ProjectCompensate, {"site": "before_cuts"}),
    (ReplacemeCompensate, {"ridge": 0.1}),
    (LinearpatchCompensate, {"tolerance": 1.0}),
]


def make_inputs(folder: Path, text: Path, removed: Sequence[int]) -> dict[str, Any]:
    model = open_folder(make_model(folder / "model", num_hidden_layers=LAYERS))
    options = {"dataset": {"path": text}, "samples": 12, "sequence_length": 48}
    calibration = run_stage(Calibrate.model_validate(options), folder / "calibration", model=model).calibration
    return {"model": model.without_layers(removed), "calibration": calibration}


def keeping_all(stage_class: type[LayerCompensation], options: dict[str, Any]) -> LayerCompensation:
    def goes_up(_: LayerCompensation) -> bool:
        return False

    return type("KeepsAll", (stage_class,), {"goes_up": goes_up, "__doc__": stage_class.__doc__}).model_validate(options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("removed", [(2,), (1, 3), (1, 2, 4), (4, 5)], ids=str)
@pytest.mark.parametrize(("stage_class", "options"), WAYS, ids=[f"{one.name} {options}" for one, options in WAYS])
def test_equal_bytes(
    stage_class: type[LayerCompensation],
    options: dict[str, Any],
    removed: tuple[int, ...],
    dtype: str,
    text: Path,
    tmp_path: Path,
) -> None:
    inputs = make_inputs(tmp_path, text, removed)
    stage = stage_class.model_validate(options)
    assert stage.goes_up()
    up = run_stage(stage, tmp_path / "up", dtype=dtype, **inputs)
    kept = run_stage(keeping_all(stage_class, options), tmp_path / "kept", dtype=dtype, **inputs)
    assert up.compensation == kept.compensation
    files = {file.name: load_file(file) for file in (tmp_path / "up").glob("*.safetensors")}
    others = {file.name: load_file(file) for file in (tmp_path / "kept").glob("*.safetensors")}
    assert files.keys() == others.keys()
    assert files
    assert all(torch.equal(value, others[name][key]) for name, tensors in files.items() for key, value in tensors.items())
    more = kept.work.rounds[0].layer_forwards - up.work.rounds[0].layer_forwards
    highest = max(site.layer for site in up.compensation.sites)
    left = [layer for layer in range(LAYERS) if layer not in removed and layer > highest]
    assert more == (LAYERS - left[0] if left else 0)  # nothing above is wanted, so the original model ends there


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> int:
    """Six batches of two samples each, of which next to nothing is kept in memory."""

    class Tight(KeptTensors):
        def __init__(self, _: int | None, *given: Any, **named: Any) -> None:
            super().__init__(30_000, *given, **named)

    monkeypatch.setattr("gradmap_pipeline.sweep.memory_plan.BATCH_TOKENS", 2 * 48)
    monkeypatch.setattr("gradmap_pipeline.sweep.sweep.KeptTensors", Tight)
    return 6


@pytest.mark.parametrize("removed", [(0, 3), (2, 3, 4), (0, 1, 5)], ids=str)
def test_equal_bytes_of_batches_that_go_to_a_file(
    removed: tuple[int, ...], text: Path, tmp_path: Path, small_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never more than two boundaries of a model are kept, on the way to a layer either."""
    inputs = make_inputs(tmp_path, text, removed)
    most: dict[int, int] = {}

    def note(kept: KeptTensors, level: int, batch: int, tensor: torch.Tensor) -> None:
        put(kept, level, batch, tensor)
        most[id(kept)] = max(most.get(id(kept), 0), sum(level < TAKEN for level, _ in kept._places()))

    put = KeptTensors.put
    monkeypatch.setattr(KeptTensors, "put", note)
    up = run_stage(ProjectCompensate(), tmp_path / "up", **inputs)
    assert sorted(most.values()) == [2 * small_batches] * 2
    kept = run_stage(keeping_all(ProjectCompensate, {}), tmp_path / "kept", **inputs)
    assert max(most.values()) > 2 * small_batches
    assert up.compensation == kept.compensation
    for file in (tmp_path / "up").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "kept" / file.name).read_bytes()


@pytest.mark.parametrize("removed", [(0, 3), (2, 3, 4)], ids=str)
def test_two_boundaries_of_each_model_are_kept(removed: tuple[int, ...], text: Path, tmp_path: Path) -> None:
    """What enters and what leaves the layer, in the original what enters the next kept one."""
    kept: dict[int, tuple[set[int], set[int]]] = {}

    class Watched(ProjectCompensate):
        """Notes what is kept after each layer."""

        def correct(self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Any) -> Any:
            done = super().correct(streams, layer, known, context)
            assert streams.original is not None
            levels = ({level for level, _ in one._kept._places() if level < TAKEN} for one in (streams.original, streams.pruned))
            kept[layer] = next(levels), next(levels)
            return done

    run_stage(Watched(), tmp_path / "out", **make_inputs(tmp_path, text, removed))
    left = [layer for layer in range(LAYERS) if layer not in removed]
    assert list(kept) == [layer for layer in left if layer + 1 >= removed[0]]
    for layer, (original, pruned) in kept.items():
        position = left.index(layer)
        assert original == {layer, left[position + 1] if position + 1 < len(left) else LAYERS}
        assert pruned <= {position, position + 1}


class Downwards(ProjectCompensate):
    """From the top down, though it says that it goes up."""

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        yield from reversed(streams.graph.layers)


class LooksBack(ProjectCompensate):
    """Up, but with a look at all layers each time."""

    def correct(self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Any) -> Any:
        streams.measure_drift()
        return super().correct(streams, layer, known, context)


class LooksBelow(ProjectCompensate):
    """Up, but with a look at the first layer each time."""

    def correct(self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Any) -> Any:
        with streams.pruned.look(0) as step:
            deque(step, maxlen=0)
        return super().correct(streams, layer, known, context)


class Prepares(ProjectCompensate):
    """Up, after a look at every cut."""

    def prepare(self, streams: Streams, context: Any) -> Any:
        streams.writers = find_writers(streams.graph, context)
        return rescale_stream(streams, nearest_scale, context)[1]


class TriesLayers(ProjectCompensate):
    """Up, with a try of the model without a layer."""

    def correct(self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Any) -> Any:
        streams.pruned.loss_without(layer)
        return super().correct(streams, layer, known, context)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        (Downwards(), "stage 'project_compensate' goes up, but 'choose' gives layer 4 after 5"),
        (
            LooksBack(),
            r"before layer \d are not kept: models that go up side by side have those at one layer alone; what looks",
        ),
        (LooksBelow(), "before layer 0 are not kept: models that go up side by side"),
        (Prepares(), r"before layer \d are not kept: models that go up side by side"),
        (TriesLayers(), "a loss without a layer starts from hidden states below it, which are not kept: models that go up"),
    ],
)
def test_a_stage_that_does_not_go_up_is_told(stage: LayerCompensation, told: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=told):
        run_stage(stage, tmp_path / "out", **make_inputs(tmp_path, text, [2]))


def test_planned_are_four_boundaries(tmp_path: Path) -> None:
    """Where they find no room in memory, so many lie on the disk at a time; else every one of both models does."""
    costs = ModelCosts(make_model(tmp_path / "model", num_hidden_layers=LAYERS), "model", None, Machine(), tmp_path)
    samples, tokens = 1 << 26, 32
    boundary = samples * tokens * 32 * 4
    up, kept = (costs.two_streams(4, samples, tokens, StreamWork(1 << 20, 3, goes_up=goes_up)) for goes_up in (True, False))
    in_memory = up.lines["hidden states"]
    assert 0 < in_memory < boundary
    assert up.disk_bytes == 4 * boundary - in_memory
    assert up.bytes_written == pytest.approx(up.disk_bytes * (LAYERS + 4 + 2) / 4)
    assert kept.disk_bytes == kept.bytes_written == pytest.approx((LAYERS + 4 + 2) * boundary, rel=0.1)
    assert up.flops == kept.flops


def test_planned_inputs_of_a_map_lie_beside_them_where_there_is_room(tmp_path: Path) -> None:
    costs = ModelCosts(make_model(tmp_path / "model", num_hidden_layers=LAYERS), "model", None, Machine(), tmp_path)
    boundary, taken = 8 * 32 * 32 * 4, 8 * 32 * 64 * 4
    stage = ProjectCompensate()
    assert stage.estimate_streams(LayersLeft(range(LAYERS), 4), 8, 32, costs).lines["hidden states"] == 4 * boundary + taken
    tight = costs.two_streams(4, 1 << 26, 32, StreamWork(1 << 20, goes_up=True, taken=1 << 50))
    assert tight.lines["hidden states"] < 1 << 50


def test_planned_memory_holds_one_layer_of_either_model(tmp_path: Path) -> None:
    costs = ModelCosts(make_model(tmp_path / "model", num_hidden_layers=LAYERS), "model", None, Machine(), tmp_path)
    up, kept = (costs.two_streams(4, 8, 32, StreamWork(1 << 20, 3, goes_up=goes_up)) for goes_up in (True, False))
    assert up.lines["layer weights"] == 4 * max(costs.layer_elements.values())
    assert kept.lines["layer weights"] == 4 * sum(costs.layer_elements.values())


def test_refit_layers_come_to_equal_bytes(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, text, [1, 3])
    stage = RefitLayers(steps=5, batch_size=2, learning_rate=1e-3)
    up = run_stage(stage, tmp_path / "up", **inputs)

    def keep_all(*given: Any, goes_up: bool) -> Streams:
        assert goes_up
        return open_streams(*given)

    monkeypatch.setattr("gradmap_plugins.refit_layers.open_streams", keep_all)
    kept = run_stage(stage, tmp_path / "kept", **inputs)
    assert any(layer.after < layer.before for layer in up.refit.layers)
    assert up.refit == kept.refit
    for file in (tmp_path / "up").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "kept" / file.name).read_bytes()
