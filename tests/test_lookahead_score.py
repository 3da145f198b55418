"""The search that looks ahead, against whole models that are pruned and corrected in another way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.lookahead_score import LookaheadScore
from gradmap_plugins.project_compensate import ProjectCompensate
from tiny import make_model
from transformers import AutoModelForCausalLM

from gradmap_pipeline import (
    CalibrationSet,
    CorrectedModel,
    ModelGraph,
    OptionError,
    StructureProbe,
    TensorFile,
    divide_samples,
    room_for,
)
from gradmap_pipeline.checkpoint.architecture import load_config
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.sweep import sweep as door
from gradmap_pipeline.sweep.kept_tensors import ARGUMENTS, KeptTensors
from gradmap_pipeline.sweep.memory_plan import SweepPlan, plan_sweep
from gradmap_pipeline.sweep.needs import SweepNeeds
from gradmap_pipeline.testing import make_context, run_stage

LAYERS = 6
RIDGE, SHRINK = 0.1, 0.4
TOLERANCE = 5e-3
"""Of a divergence whose one side is kept in half precision."""


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[ModelGraph, CalibrationSet]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} is {number * number % 97}; " for number in range(3000)))
    model = open_folder(make_model(tmp_path / "model", num_hidden_layers=LAYERS))
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 24, "sequence_length": 48})
    return model, run_stage(stage, tmp_path / "calibration", model=model).calibration


def open_corrected(model: ModelGraph, calibration: CalibrationSet, folder: Path) -> CorrectedModel:
    context = make_context(folder)
    fit, held_out = divide_samples(calibration.load(), 8)
    sites = StructureProbe(model, context.memory).find_sites()
    reserve = room_for(*model.map_sizes())
    return CorrectedModel(model, fit, held_out, sites, context, reserve=reserve, ridge=RIDGE, shrink=SHRINK)


def predict(model: ModelGraph, removed: set[int], patches: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, T-1, V), fp64, in plain transformers, without some layers and with other values of some weights."""
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in patches.items():
            whole.get_parameter(name).copy_(value)
        whole.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(whole.model.layers) if index not in removed)
        whole.config.num_hidden_layers = len(whole.model.layers)
        return whole(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def divergence(original: torch.Tensor, ours: torch.Tensor) -> float:
    return float((original.exp() * (original - ours)).sum(-1).mean())


def patches_of(model: ModelGraph, removed: set[int], calibration: CalibrationSet, folder: Path) -> dict[str, torch.Tensor]:
    """What `project_compensate` makes of the weights."""
    stage = ProjectCompensate(ridge=RIDGE, shrink=SHRINK)
    result = run_stage(stage, folder, model=model.without_layers(removed), calibration=calibration).model
    return {name: file.load()[name] for name, file in result.patches.items()}


def test_divergences_are_those_of_whole_models_pruned_and_corrected(
    inputs: tuple[ModelGraph, CalibrationSet], tmp_path: Path
) -> None:
    model, calibration = inputs
    (fit_ids, fit_mask), (ids, _) = divide_samples(calibration.load(), 8)
    fit = calibration_of(calibration, fit_ids, fit_mask, tmp_path / "fit")
    original = predict(model, set(), {}, ids)
    corrected = open_corrected(model, calibration, tmp_path / "search")

    assert corrected.divergence() == pytest.approx(0, abs=1e-6)
    below = "model.layers.2.mlp.down_proj.weight"
    patch = {below: patches_of(model, {3}, fit, tmp_path / "one")[below]}
    assert corrected.divergence_without(3) == pytest.approx(
        divergence(original, predict(model, {3}, patch, ids)), rel=TOLERANCE, abs=2e-6
    )
    assert corrected.divergence() == pytest.approx(0, abs=1e-6)  # trying a candidate leaves nothing behind

    corrected.remove([1])
    patches = patches_of(model, {1}, fit, tmp_path / "all")
    expected = divergence(original, predict(model, {1}, patches, ids))
    assert corrected.divergence() == pytest.approx(expected, rel=TOLERANCE, abs=2e-6)
    for layer in (2, 3, 4):
        corrected.divergence_without(layer)
    corrected.remove([4])
    patches = patches_of(model, {1, 4}, fit, tmp_path / "both")
    expected = divergence(original, predict(model, {1, 4}, patches, ids))
    assert corrected.divergence() == pytest.approx(expected, rel=TOLERANCE, abs=2e-6)
    corrected.close()

    at_once = open_corrected(model, calibration, tmp_path / "again")
    at_once.remove([1, 4])
    assert at_once.divergence() == pytest.approx(expected, rel=TOLERANCE, abs=2e-6)
    at_once.close()


def test_the_lowest_layer_has_none_below_it_to_correct(inputs: tuple[ModelGraph, CalibrationSet], tmp_path: Path) -> None:
    model, calibration = inputs
    _, (ids, _) = divide_samples(calibration.load(), 8)
    corrected = open_corrected(model, calibration, tmp_path / "search")
    expected = divergence(predict(model, set(), {}, ids), predict(model, {0}, {}, ids))
    assert corrected.divergence_without(0) == pytest.approx(expected, rel=TOLERANCE, abs=2e-6)
    corrected.close()


def test_a_search_makes_the_decisions_of_one_that_tries_every_layer(
    inputs: tuple[ModelGraph, CalibrationSet], tmp_path: Path
) -> None:
    """With as many candidates as layers the queue is never cut short; and the decisions go by the least increase."""
    model, calibration = inputs
    stage = LookaheadScore(layers=3, candidates=LAYERS, sample_share=1.0)
    scores = run_stage(stage, tmp_path / "search", model=model, calibration=calibration).scores
    corrected, removed = open_corrected(model, calibration, tmp_path / "by hand"), []
    for decision in scores.decisions:
        now = corrected.divergence()
        increases = {layer: corrected.divergence_without(layer) - now for layer in range(1, LAYERS - 1) if layer not in removed}
        assert decision.removed == min(increases, key=increases.__getitem__)
        assert decision.scores == pytest.approx(increases, rel=1e-3, abs=1e-5)
        removed.append(decision.removed)
        corrected.remove([decision.removed])
    corrected.close()


def test_a_search_that_goes_on_decides_as_one_that_did_not_stop(inputs: tuple[ModelGraph, CalibrationSet], tmp_path: Path) -> None:
    model, calibration = inputs
    stage = LookaheadScore(layers=3, candidates=1)
    _, whole = stage.open_scorer(model, calibration, make_context(tmp_path / "whole"))
    kept, before, rankings = set(model.layers), {}, []
    for _ in range(3):
        before = whole.score(kept, before)["scores"]
        rankings.append(before)
        kept = kept - {min(before, key=before.__getitem__)}
    whole.close()

    _, later = stage.open_scorer(model, calibration, make_context(tmp_path / "later"))
    left = set(model.layers) - {min(ranking, key=ranking.__getitem__) for ranking in rankings[:2]}
    assert later.score(left, rankings[1])["scores"] == pytest.approx(rankings[2], rel=1e-4)
    later.close()


def test_work_is_a_part_of_a_search_by_loss(inputs: tuple[ModelGraph, CalibrationSet], tmp_path: Path) -> None:
    """All work is counted; two thirds of the samples are for the fit."""
    model, calibration = inputs
    work = run_stage(LookaheadScore(layers=1, sample_share=1.0), tmp_path / "run", model=model, calibration=calibration).work
    fit = 2 / 3 * (LAYERS + 3 + 4)  # the original; the pruned one up to layer 3; the layer below each candidate
    held_out = 1 / 3 * (LAYERS + sum(LAYERS - layer for layer in range(1, LAYERS - 1)))
    assert work.rounds[0].layer_forwards == pytest.approx(fit + held_out)


def test_what_is_kept_is_what_a_plan_counts(
    inputs: tuple[ModelGraph, CalibrationSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it; where memory is short, each kind has its share of what there is, and the decisions are the same."""
    model, calibration = inputs
    opened: list[KeptTensors] = []
    most: dict[int, int] = {}
    make, put = KeptTensors.__init__, KeptTensors.put

    def look(kept: KeptTensors, *arguments: Any, **options: Any) -> None:
        make(kept, *arguments, **options)
        opened.append(kept)

    def count(kept: KeptTensors, level: int, batch: int, tensor: torch.Tensor) -> None:
        put(kept, level, batch, tensor)
        held = sum(one.nbytes for (at, _), one in kept._held.items() if at < ARGUMENTS)
        most[id(kept)] = max(most.get(id(kept), 0), held)

    monkeypatch.setattr(KeptTensors, "__init__", look)
    monkeypatch.setattr(KeptTensors, "put", count)

    def score(folder: str) -> list[Any]:
        opened.clear()
        most.clear()
        stage = LookaheadScore(layers=2, sample_share=1.0)
        decisions = run_stage(stage, tmp_path / folder, model=model, calibration=calibration).scores.decisions
        return [(decision.removed, decision.scores) for decision in decisions]

    roomy = score("a")
    words = int(load_config(model.base.folder)["vocab_size"])
    wanted = CorrectedModel.count_kept_bytes(model, (16, 8), 48, words, "float32")
    assert [most[id(kept)] / size for kept, size in zip(opened, wanted.values(), strict=True)] == pytest.approx([1] * 4, rel=0.16)

    room = sum(wanted.values()) // 3

    def plan_tight(needs: SweepNeeds, free: int, *, reserve: int, **options: Any) -> SweepPlan:
        return replace(plan_sweep(needs, free, reserve=reserve, **options), kept_limit=room + reserve)

    monkeypatch.setattr(door, "plan_sweep", plan_tight)
    for (removed, scores), (as_before, expected) in zip(score("b"), roomy, strict=True):
        assert removed == as_before
        assert scores == pytest.approx(expected, rel=1e-4)  # what changes is added, or all is run again
    assert sum(kept.limit_bytes or 0 for kept in opened) == pytest.approx(room, abs=4)
    for kept, size in zip(opened, wanted.values(), strict=True):
        assert kept.limit_bytes == pytest.approx(room * size / sum(wanted.values()), abs=1)
        assert kept.bytes_written > 0


def test_too_few_samples_are_refused(inputs: tuple[ModelGraph, CalibrationSet], tmp_path: Path) -> None:
    model, calibration = inputs
    stage = LookaheadScore(layers=1, sample_share=0.01)
    with pytest.raises(OptionError, match="1 of 24 samples are used, and corrections and predictions need one each at least"):
        run_stage(stage, tmp_path / "run", model=model, calibration=calibration)


def calibration_of(like: CalibrationSet, ids: torch.Tensor, mask: torch.Tensor, folder: Path) -> CalibrationSet:
    """The same calibration set with other samples."""
    folder.mkdir()
    tensors = {"input_ids": ids.to(torch.int32), "attention_mask": mask.to(torch.uint8)}
    file = TensorFile.save(tensors, folder / "tokens.safetensors")
    return like.model_copy(update={"tensors": file, "samples": len(ids), "tokens": int(mask.sum())})
