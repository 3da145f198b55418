"""What a sweep does with the memory it may have."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.gradmap_score import GradmapScore
from tiny import make_model
from transformers import AutoModelForCausalLM

from gradmap_pipeline import CapacityError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.memory_plan import plan_sweep
from gradmap_pipeline.sweep.needs import SweepNeeds, measure_needs
from gradmap_pipeline.sweep.sweep import open_sweep
from gradmap_pipeline.testing import make_context, run_stage

MIB = 1 << 20
NEEDS = SweepNeeds(
    samples=64,
    tokens=2048,
    layers=32,
    layer_bytes=400 * MIB,
    all_layer_bytes=32 * 400 * MIB,
    stored_bytes=32 * 400 * MIB,
    boundary_bytes=16 * MIB,
    saved_bytes=400 * MIB,
    words=32000,
    logits_at_once=1 << 24,
)


def test_measuring_leaves_nothing_in_memory(llama: Path) -> None:
    """Autograd frees what it saved of the one sample, and with it the weights of the layer."""

    def find_tensors() -> set[int]:
        gc.collect()
        return {id(found) for found in gc.get_objects() if type(found) is torch.Tensor and found.ndim > 1}

    model = LayerwiseModel(open_folder(llama), resident_bytes=0)
    measure_needs(model, 1, 40)
    before = find_tensors()
    measure_needs(model, 1, 40)
    assert find_tensors() <= before


def test_reading_ahead_takes_the_room_of_a_second_layer() -> None:
    """It is planned for, and left where hidden states or a reserve need the room."""
    few = replace(NEEDS, samples=1)
    ahead, again = plan_sweep(few, 3 << 30), plan_sweep(replace(few, has_slow_reads=False), 3 << 30)
    assert (ahead.reads_ahead, again.reads_ahead) == (True, False)
    assert ahead.peak_bytes == again.peak_bytes + NEEDS.layer_bytes
    assert ahead.kept_limit == again.kept_limit - NEEDS.layer_bytes
    assert not plan_sweep(few, 3 << 30, reserve=1 << 31).reads_ahead
    assert not plan_sweep(few, 64 << 30).reads_ahead


def test_too_little_is_said() -> None:
    with pytest.raises(
        CapacityError,
        match=r"one sample of 2048 tokens at a time takes 1.12 GiB \(activations 0.63 GiB, layer weights 0.39 GiB,"
        r" allocator 96 MiB\) beside .* over the 1.00 GiB allowed; use --dtype bfloat16, or allow 1.3GiB or more with --memory",
    ):
        plan_sweep(NEEDS, 1 << 30)


def test_what_is_no_sum_goes_through_together() -> None:
    assert plan_sweep(replace(NEEDS, has_weight_gradients=True), 4 << 30, divisible=False).passes == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_measured_needs_cover_what_is_used(architecture: str, tmp_path: Path) -> None:
    """Autograd saves at least the input of each linear map, and no more than a few dozen values per unit of width."""
    model = LayerwiseModel(open_folder(make_model(tmp_path, architecture)))
    needs = measure_needs(model, 8, 40)
    assert needs.boundary_bytes == 40 * 32 * 4
    assert needs.all_layer_bytes == needs.stored_bytes == 4 * needs.layer_bytes
    assert 40 * 4 * (32 * 3 + 64) < needs.saved_bytes < 40 * 4 * (32 + 64) * 40
    double = measure_needs(model, 8, 20).saved_bytes
    assert needs.saved_bytes == pytest.approx(2 * double, rel=0.5)


@pytest.mark.parametrize(
    "forced",
    [
        {"passes": 3, "keeps_graphs": False},
        {"passes": 3, "keeps_graphs": True},
        {"is_resident": False, "keeps_graphs": False, "reads_ahead": False},
        {"is_resident": False, "keeps_graphs": False, "reads_ahead": True},
        {"is_resident": False, "keeps_graphs": False, "kept_limit": 2000},
        {"passes": 1, "keeps_graphs": True},
        {"batch_samples": 1},
    ],
    ids=str,
)
def test_gradients_and_losses_under_any_plan_are_those_of_the_whole_model(
    forced: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    ids = torch.randint(3, 250, (7, 24), generator=torch.Generator().manual_seed(0))
    samples, graph, context = (ids, torch.ones_like(ids)), open_folder(llama), make_context(tmp_path)
    with open_sweep(graph, samples, context, need="backward") as sweep:
        plan = replace(sweep.plan, **forced)
    gradients: dict[int, list[torch.Tensor]] = {layer: [] for layer in graph.layers}
    with open_sweep(graph, samples, context, need="backward", plan=plan) as sweep:
        assert len(sweep.batches) == (7 if plan.batch_samples == 1 else plan.passes)
        for step in sweep.backward():
            gradients[step.layer] += [visit.gradient for visit in step]
        assert (sweep.kept.bytes_written > 0) == ("kept_limit" in forced)
    with open_sweep(graph, samples, context, plan=replace(plan, keeps_graphs=False)) as sweep:
        losses = torch.cat(list(sweep.losses()))
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    states = {}
    for layer, module in enumerate(whole.model.layers):
        module.register_forward_hook(lambda _, __, output, layer=layer: states.update({layer: output}) or output.retain_grad())
    logits = whole(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected.mean().backward()
    assert torch.allclose(losses.flatten().double(), expected, rtol=1e-4)
    for layer, parts in gradients.items():
        exact = states[layer].grad
        assert (torch.cat(parts) - exact).norm() <= 1e-5 * exact.norm()


def test_memory_plan_reaches_the_stage(tmp_path: Path, llama: Path, text: Path) -> None:
    model = open_folder(llama)
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 4, "sequence_length": 24})
    calibration = run_stage(stage, tmp_path / "calibration", model=model).calibration
    context = make_context(tmp_path / "step", memory=1 << 20)
    with pytest.raises(CapacityError, match=r"use --dtype bfloat16, or allow [0-9.]+[MG]iB or more with --memory"):
        GradmapScore(sample_share=1.0, layers=1).run(GradmapScore.Inputs(model=model, calibration=calibration), context)
