"""Sweeps on the device: three tiers of memory, each within its budget, and the next layer read ahead in order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model

from gradmap_pipeline.batches import make_batches
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.correction.ridge import solve_ridge
from gradmap_pipeline.machine.accelerators import module_of
from gradmap_pipeline.machine.memory import resident_bytes
from gradmap_pipeline.sweep import memory_plan, sweep as door
from gradmap_pipeline.sweep.kept_tensors import ARGUMENTS, GRADIENTS, KeptTensors
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.prefetch import Prefetcher
from gradmap_pipeline.sweep.sample_pass import SamplePass
from gradmap_pipeline.sweep.sweep import open_sweep
from gradmap_pipeline.testing import make_context

IDS = torch.randint(3, 250, (12, 32), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
for row in range(12):
    MASK[row, 31 - row % 5 :] = 0
SIZE = 1024
"""Bytes of a tensor that is kept; a power of two, as pinned memory is handed out."""
LEVELS, BATCHES = 5, 4


def make_tensor(level: int, batch: int) -> torch.Tensor:
    return torch.full((SIZE // 4,), 100.0 * level + batch)


def where(kept: KeptTensors, level: int, batch: int) -> str:
    """The tier that has a tensor."""
    place = level, batch
    return "device" if place in kept._held else "host" if place in kept._host else "file"


@pytest.mark.usefixtures("faults")
def test_tensors_go_from_the_device_to_the_host_and_then_to_the_file(device: str, tmp_path: Path) -> None:
    """A forward sweep; then those that a backward sweep uses first are nearest, and all come back as they were."""
    kept = KeptTensors(8 * SIZE, tmp_path, host_bytes=5 * SIZE)
    for batch in range(BATCHES):
        kept.put(0, batch, make_tensor(0, batch).to(device))
        kept.put(ARGUMENTS, batch, make_tensor(LEVELS, batch).to(device))
    for level in range(1, LEVELS):
        for batch in range(BATCHES):
            kept.get(level - 1, batch)
            kept.get(ARGUMENTS, batch)
            kept.put(level, batch, make_tensor(level, batch).to(device))
            assert sum(tensor.nbytes for tensor in kept._held.values()) <= 8 * SIZE
            assert sum(one.pinned.nbytes for one in kept._host.values()) <= 5 * SIZE
    tiers = {(level, batch): where(kept, level, batch) for level in range(LEVELS) for batch in range(BATCHES)}
    assert all(where(kept, ARGUMENTS, batch) == "device" for batch in range(BATCHES))
    assert [tiers[4, batch] for batch in range(BATCHES)] == ["device"] * 4
    assert [tiers[3, batch] for batch in range(BATCHES)] == ["host"] * 4
    assert [tiers[2, batch] for batch in range(BATCHES)] == ["host", "file", "file", "file"]
    assert {tiers[level, batch] for level in (0, 1) for batch in range(BATCHES)} == {"file"}
    kept.is_going_down = True
    for level in reversed(range(LEVELS)):
        for batch in range(BATCHES):
            value = kept.get(level, batch)
            assert str(value.device) == device
            assert torch.equal(value.cpu(), make_tensor(level, batch))
            kept.put(GRADIENTS, batch, make_tensor(level, batch).to(device))
    assert all(torch.equal(kept.get(GRADIENTS, batch).cpu(), make_tensor(0, batch)) for batch in range(BATCHES))
    kept.clear()
    assert (kept._held_bytes, kept._host_held) == (0, 0)


def test_one_boundary_at_a_time_writes_only_what_has_no_room(device: str, tmp_path: Path) -> None:
    """What comes next stays; of four batches one has no room, so one goes to the file at each layer."""
    kept = KeptTensors(2 * SIZE, tmp_path, host_bytes=SIZE)
    for batch in range(BATCHES):
        kept.put(0, batch, make_tensor(0, batch).to(device))
    for level in range(1, LEVELS):
        for batch in range(BATCHES):
            assert torch.equal(kept.get(level - 1, batch).cpu(), make_tensor(level - 1, batch))
            kept.forget(level - 1, batch)
            kept.put(level, batch, make_tensor(level, batch).to(device))
    assert kept.bytes_written <= LEVELS * SIZE


def sweep_through(folder: Path, place: Path, device: str, **forced: Any) -> list[torch.Tensor]:
    """Gradients, weight gradients and losses of a sweep whose plan is changed so."""
    graph = open_folder(folder)
    context = replace(make_context(place, memory=1 << 32), device=device)
    if device != "cpu":
        context = replace(context, memory=resident_bytes(device) + (1 << 30), host_memory=resident_bytes() + (1 << 30))
    plan_sweep = memory_plan.plan_sweep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "plan_sweep", lambda *given, **options: replace(plan_sweep(*given, **options), **forced))
        with open_sweep(graph, (IDS, MASK), context, need="weight gradients", divisible=False) as sweep:
            found = []
            for step in sweep.backward():
                found += [visit.gradient.cpu() for visit in step]
                found += [value.cpu() for value in step.weight_gradients.values()]
            return found + [losses.cpu() for losses in sweep.losses()]


TIGHT: dict[str, Any] = {"is_resident": False, "keeps_graphs": False, "batch_samples": 2, "passes": 1}


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize(
    "forced",
    [
        {**TIGHT, "reads_ahead": True, "kept_limit": 1 << 30},
        {**TIGHT, "reads_ahead": True, "kept_limit": 30000, "host_limit": 60000},
        {**TIGHT, "reads_ahead": False, "kept_limit": 0, "host_limit": 0},
    ],
    ids=["on the device", "three tiers", "file alone"],
)
def test_a_sweep_gives_what_it_gives_on_the_cpu(architecture: str, forced: dict[str, Any], device: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", architecture)
    expected = sweep_through(folder, tmp_path / "cpu", "cpu", **TIGHT)
    found = sweep_through(folder, tmp_path / "device", device, **forced)
    assert len(found) == len(expected) > 50
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_at_most_one_layer_is_ahead_on_the_device(device: str, tmp_path: Path) -> None:
    """With what one layer computes, there are two layers at the peak, and one without reading ahead."""
    shape = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = make_model(tmp_path / "model", **shape)
    graph = open_folder(folder)
    layer = 4 * max(graph.layer_elements().values())
    accelerator = module_of(device)
    peaks = {}
    for reads_ahead in (False, True):
        model = LayerwiseModel(graph, device=device, resident_bytes=0)
        model.weights.reads_ahead = reads_ahead
        samples = SamplePass(model, make_batches(IDS[:1, :8], torch.ones(1, 8)), kept=KeptTensors(0, tmp_path))
        before = accelerator.memory_allocated(device)
        accelerator.reset_peak_memory_stats(device)
        for step in samples.forward():
            for _ in step:
                pass
        accelerator.synchronize(device)
        peaks[reads_ahead] = (accelerator.max_memory_allocated(device) - before) / layer
    assert 1 <= peaks[False] < 1.5
    assert 2 <= peaks[True] < 2.5


@pytest.mark.usefixtures("faults")
def test_a_layer_is_copied_once_the_one_before_is_done(device: str, tmp_path: Path) -> None:
    """The order of events: what was in the stream is over, the layer is copied, and the stream waits for the copy."""
    standin = pytest.importorskip("standin") if device.startswith("standin") else pytest.skip("the order is in the stand-in's log")
    model = LayerwiseModel(open_folder(make_model(tmp_path)), device=device, resident_bytes=0)
    model.weights.reads_ahead = True
    samples = SamplePass(model, make_batches(IDS, torch.ones_like(IDS)))
    list(samples.losses())
    standin.native.take_log()
    samples.invalidate_from(0)
    samples.run_forward()
    log = standin.native.take_log()
    stream = next(line.removeprefix("copy on ") for line in log if line.startswith("copy on stream"))
    shortened = [line for number, line in enumerate(log) if number == 0 or line != log[number - 1]]
    once = [
        "record the default stream",
        "the host waits for the default stream",
        f"copy on {stream}",
        f"record {stream}",
        f"the default stream waits for {stream}",
    ]
    assert shortened == once * 3


@pytest.mark.parametrize("mistake", ["no wait", "not recorded"])
def test_a_mistake_in_reading_ahead_shows(mistake: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin = pytest.importorskip("standin") if device.startswith("standin") else pytest.skip("a GPU may not show it")

    def take(self: Prefetcher, layer: int) -> dict[str, torch.Tensor] | None:
        if self._coming is None:
            return None
        weights, copied = self._coming[1].result()
        self._coming = None
        if mistake == "not recorded":
            torch.accelerator.current_stream(device).wait_event(copied)
        return weights

    monkeypatch.setattr(Prefetcher, "take", take)
    model = LayerwiseModel(open_folder(make_model(tmp_path)), device=device, resident_bytes=0)
    model.weights.reads_ahead = True
    found: list[str] = []
    try:
        SamplePass(model, make_batches(IDS, torch.ones_like(IDS))).run_forward()
    except RuntimeError as error:
        found = [str(error)]
    found += standin.native.take_faults()
    wanted = "writes without waiting for it" if mistake == "no wait" else "call record_stream"
    assert any(wanted in line for line in found)


def test_the_solver_works_in_place(device: str) -> None:
    """Cholesky overwrites its matrix: beside both matrices the device holds a fraction of one, and the solution is the CPU's."""
    inputs, width = 256, 16
    factors = torch.randn(1000, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram, cross = factors.T @ factors, factors.T @ factors[:, :width]
    expected = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(inputs, dtype=torch.float64), cross)
    moved = gram.to(device), cross.to(device)
    accelerator = module_of(device)
    before = accelerator.memory_allocated(device)
    accelerator.reset_peak_memory_stats(device)
    solution, _ = solve_ridge(*moved, 0.1)
    accelerator.synchronize(device)
    assert accelerator.max_memory_allocated(device) - before < 0.6 * gram.nbytes
    torch.testing.assert_close(solution.cpu().reshape(expected.shape), expected, rtol=1e-8, atol=1e-10)
