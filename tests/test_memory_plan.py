"""What a sweep does with the memory it may have."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.gradmap_score import GradmapScore
from tiny import make_model, make_text

from gradmap_pipeline import CapacityError, ModelGraph
from gradmap_pipeline.batches import Batch
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.sweep import memory_plan, sweep
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.memory_plan import SweepNeeds, SweepPlan, measure_needs, plan_sweep
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


def test_more_memory_is_never_slower() -> None:
    """From the least that works upward: fewer bytes read, then no recomputation; and the peak stays below what is free."""
    plans = []
    for gib in (2, 4, 16, 64, 256, 4096):
        plan = plan_sweep(NEEDS, gib << 30)
        assert sum(plan.lines.values()) < plan.peak_bytes <= gib << 30
        plans.append(plan)
    assert [plan.resident for plan in plans] == [False, False, True, True, True, True]
    assert [plan.keep_graphs for plan in plans] == [False, False, False, True, True, True]
    assert all(more.bytes_read <= less.bytes_read for less, more in pairwise(plans))
    assert plans[-1].passes == 1


def test_reading_ahead_takes_the_room_of_a_second_layer() -> None:
    """It is planned for, and left where hidden states or a reserve need the room."""
    few = replace(NEEDS, samples=1)
    ahead, again = plan_sweep(few, 3 << 30), plan_sweep(replace(few, read_ahead=False), 3 << 30)
    assert (ahead.prefetch, again.prefetch) == (True, False)
    assert ahead.peak_bytes == again.peak_bytes + NEEDS.layer_bytes
    assert ahead.kept_limit == again.kept_limit - NEEDS.layer_bytes
    assert not plan_sweep(few, 3 << 30, reserve=1 << 31).prefetch
    assert not plan_sweep(few, 64 << 30).prefetch


def test_too_little_is_said() -> None:
    with pytest.raises(
        CapacityError,
        match=r"one layer \(0.39 GiB\), one sample of 2048 tokens \(0.63 GiB\) and its logits .* use --dtype bfloat16",
    ):
        plan_sweep(NEEDS, 1 << 30)


@pytest.mark.parametrize("samples", [4, 64])
@pytest.mark.parametrize("stored", [MIB, 32 * 400 * MIB])
def test_spill_or_parts_whichever_moves_fewer_bytes(samples: int, stored: int) -> None:
    needs = replace(NEEDS, samples=samples, stored_bytes=stored)
    plan = plan_sweep(needs, 2 << 30)
    over = samples * 34 * 16 * MIB - plan.kept_limit  # 33 boundaries and a gradient
    gradients = max(0, samples * 16 * MIB - plan.kept_limit) * 32
    assert not plan.resident
    if plan.passes > 1:
        assert plan.bytes_written == 0
        assert (plan.passes - 1) * 2 * stored < 2 * over
    else:
        assert plan.bytes_written == max(over, 0) + gradients
        assert plan.spilled_bytes == max(over, 0)


def test_what_is_no_sum_goes_through_together() -> None:
    assert plan_sweep(replace(NEEDS, weight_gradients=True), 4 << 30, divisible=False).passes == 1


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
        {"passes": 3, "keep_graphs": False},
        {"passes": 3, "keep_graphs": True},
        {"resident": False, "keep_graphs": False, "prefetch": False},
        {"resident": False, "keep_graphs": False, "prefetch": True},
        {"resident": False, "keep_graphs": False, "kept_limit": 2000},
        {"passes": 1, "keep_graphs": True},
        {"batch_samples": 1},
    ],
    ids=str,
)
def test_the_plan_does_not_change_the_scores(
    forced: dict[str, int | bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores over three decisions agree to the order of floating-point sums, and so do the decisions."""
    model: ModelGraph = open_folder(make_model(tmp_path / "model"))
    text = make_text(tmp_path / "text.txt")
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 7, "sequence_length": 24})
    calibration = run_stage(stage, tmp_path / "calibration", model=model).calibration
    stage = GradmapScore(sample_share=1.0, layers=3, protect_first=0, protect_last=0)
    plain = run_stage(stage, tmp_path / "plain", model=model, calibration=calibration)

    def forced_plan(*arguments: object, **options: object) -> SweepPlan:
        return replace(plan_sweep(*arguments, **options), **forced)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "plan_sweep", forced_plan)
    found = run_stage(stage, tmp_path / "forced", model=model, calibration=calibration)
    assert found.scores.order == plain.scores.order
    for mine, other in zip(found.scores.decisions, plain.scores.decisions, strict=True):
        assert mine.scores == pytest.approx(other.scores, rel=1e-5)


def test_memory_plan_reaches_the_stage(tmp_path: Path, llama: Path, text: Path) -> None:
    model = open_folder(llama)
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 4, "sequence_length": 24})
    calibration = run_stage(stage, tmp_path / "calibration", model=model).calibration
    context = make_context(tmp_path / "step", memory=1 << 20)
    with pytest.raises(CapacityError, match="or allow more with --memory"):
        GradmapScore(sample_share=1.0, layers=1).run(GradmapScore.Inputs(model=model, calibration=calibration), context)


def test_saved_values_are_not_counted_twice(llama: Path) -> None:
    model = LayerwiseModel(open_folder(llama))
    ids = torch.zeros(1, 8, dtype=torch.long)
    hidden, arguments = model.record(Batch(ids, torch.ones(1, 8, dtype=torch.bool)))
    once = memory_plan._measure_saved(model, 0, hidden, arguments[0])
    assert once == memory_plan._measure_saved(model, 0, hidden, arguments[0])
