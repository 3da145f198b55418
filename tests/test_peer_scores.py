"""Rankings of other methods, against their formulas computed from whole models in another way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.angular_score import AngularScore
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.last_layers_score import LastLayersScore
from gradmap_plugins.magnitude_score import MagnitudeScore
from gradmap_plugins.perplexity_score import PerplexityScore
from gradmap_plugins.prune import Prune
from gradmap_plugins.random_score import RandomScore
from gradmap_plugins.shortgpt_score import ShortgptScore
from gradmap_plugins.sleb_score import SlebScore
from gradmap_plugins.taylor_score import TaylorScore
from tiny import make_model
from transformers import AutoModelForCausalLM

from gradmap_pipeline import (
    CalibrationSet,
    Forecasts,
    LayerScores,
    ModelForecast,
    ModelGraph,
    OptionError,
    ScoresForecast,
    StageError,
    TensorFile,
)
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.testing import run_stage

LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    return open_folder(make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def calibration(model: ModelGraph, text: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    """Padded: samples of 24, 20, 16 ... tokens."""
    folder = tmp_path_factory.mktemp("calibration")
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 6, "sequence_length": 24})
    calibration_set = run_stage(stage, folder, model=model).calibration
    ids, mask = calibration_set.load()
    for row in range(6):
        mask[row, 24 - 4 * row :] = 0
    tensors = {"input_ids": ids.to(torch.int32), "attention_mask": mask.to(torch.uint8)}
    file = TensorFile.save(tensors, folder / "padded.safetensors")
    return CalibrationSet(**{**dict(calibration_set), "tensors": file, "tokens": int(mask.sum())})


@pytest.fixture(scope="module")
def whole(model: ModelGraph) -> Any:
    return AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64, attn_implementation="eager").eval()


def hidden_states(whole: Any, calibration: CalibrationSet) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What enters layer 0, 1 ..., and what leaves the last, each (B, T, D); and the mask, bool (B, T)."""
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0])) for layer in whole.model.layers]
    hooks.append(whole.model.norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0])))
    ids, mask = calibration.load()
    with torch.no_grad():
        whole(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return seen, mask.bool()


@contextmanager
def without(whole: Any, removed: list[int]) -> Iterator[None]:
    """Layers that hand on what they get."""
    kept = {index: whole.model.layers[index].forward for index in removed}
    for index in removed:
        whole.model.layers[index].forward = lambda hidden_states, *_args, **_named: hidden_states
    try:
        yield
    finally:
        for index, forward in kept.items():
            whole.model.layers[index].forward = forward


def mean_loss(whole: Any, calibration: CalibrationSet, removed: list[int]) -> torch.Tensor:
    """Of all predicted tokens, by hand from the logits."""
    ids, mask = calibration.load()
    with without(whole, removed):
        predictions = whole(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
    losses = -predictions.gather(-1, ids[:, 1:, None])[..., 0]
    return losses[mask[:, 1:].bool()].mean()


def run(stage: Any, folder: Path, model: ModelGraph, calibration: CalibrationSet) -> Any:
    return run_stage(stage, folder, model=model, calibration=calibration)


def test_block_influence(model: ModelGraph, calibration: CalibrationSet, whole: Any, tmp_path: Path) -> None:
    states, mask = hidden_states(whole, calibration)
    result = run(ShortgptScore(layers=2), tmp_path, model, calibration)
    scores = result.scores.decisions[0].scores
    for layer in range(LAYERS):
        before, after = states[layer][mask], states[layer + 1][mask]
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert scores[layer] == pytest.approx(float((1 - cosine).sum()), rel=1e-4)
    assert result.scores.order == tuple(sorted(scores, key=scores.__getitem__)[:2])
    assert result.work.layer_evaluations == LAYERS


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_angle_across_a_window(tokens: str, model: ModelGraph, calibration: CalibrationSet, whole: Any, tmp_path: Path) -> None:
    states, mask = hidden_states(whole, calibration)
    expected = {}
    for start in range(LAYERS - 3 + 1):
        cosine = torch.nn.functional.cosine_similarity(states[start], states[start + 3], dim=-1)
        angles = torch.arccos(cosine.clamp(-1, 1)) / math.pi
        if tokens == "last":
            expected[start] = sum(float(angles[row, 24 - 4 * row - 1]) for row in range(6))
        else:
            expected[start] = float(angles[mask].sum())
    result = run(AngularScore.model_validate({"layers": 3, "tokens": tokens}), tmp_path, model, calibration)
    assert result.scores.decisions[0].scores == pytest.approx(expected, rel=1e-4)
    best = min(expected, key=expected.__getitem__)
    assert result.scores.order == (best, best + 1, best + 2)
    guarded = AngularScore.model_validate({"layers": 3, "tokens": tokens, "protect_first": best + 1})
    if best + 1 + 3 <= LAYERS:
        scores = run(guarded, tmp_path, model, calibration).scores
        assert scores.order[0] == min((start for start in expected if start > best), key=expected.__getitem__)
        assert scores.decisions[0].removed_if_unprotected == best


def test_a_window_is_removed_whole(model: ModelGraph, calibration: CalibrationSet, tmp_path: Path) -> None:
    scores = run(AngularScore(layers=3), tmp_path, model, calibration).scores
    assert scores.all_or_nothing
    known = Forecasts(Prune, model=ModelForecast(layers=6), scores=ScoresForecast(decisions=3, all_or_nothing=True))
    with pytest.raises(OptionError, match="removes 2 of 6 layers, but 3 were chosen to go together; set the same 'layers'"):
        Prune(layers=2).forecast(known)
    with pytest.raises(OptionError, match="the scored layers were chosen to go together, and 'expressible' would choose among"):
        Prune(layers=3, among="expressible").forecast(known)
    pruned = run_stage(Prune(layers=3), tmp_path, model=model, scores=scores).model
    assert pruned.removed == scores.order
    with pytest.raises(StageError, match="no 3 neighbouring layers are free of protected ones"):
        AngularScore(layers=3).decide(range(6), dict.fromkeys(range(4), 1.0), 3, {2, 3})


def test_taylor_is_weight_times_gradient(model: ModelGraph, calibration: CalibrationSet, whole: Any, tmp_path: Path) -> None:
    whole.zero_grad()
    mean_loss(whole, calibration, []).backward()
    expected = {
        index: sum(float((weight.detach() * weight.grad).abs().sum()) for weight in layer.parameters())
        for index, layer in enumerate(whole.model.layers)
    }
    stage = TaylorScore(layers=2, protect_first=0, protect_last=0)
    result = run(stage, tmp_path, model, calibration)
    assert result.scores.decisions[0].scores == pytest.approx(expected, rel=1e-3)
    assert result.scores.order == tuple(sorted(expected, key=expected.__getitem__)[:2])
    with pytest.raises(OptionError, match=r"2 of 6 layers are to be scored .* only 0 are not protected; .*'protect_first' \(4\)"):
        TaylorScore(layers=2).forecast(Forecasts(TaylorScore, model=ModelForecast(layers=6)))


def test_loss_without_each_layer(model: ModelGraph, calibration: CalibrationSet, whole: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = {layer: float(mean_loss(whole, calibration, [layer])) for layer in range(LAYERS)}
    result = run(PerplexityScore(layers=3), tmp_path, model, calibration)
    assert result.scores.decisions[0].scores == pytest.approx(expected, rel=1e-5)
    inner = sorted(range(1, LAYERS - 1), key=expected.__getitem__)
    assert result.scores.order == tuple(inner[:3])


@pytest.mark.parametrize("prefix", ["kept", "computed"])
def test_greedy_search(prefix: str, model: ModelGraph, calibration: CalibrationSet, whole: Any, tmp_path: Path) -> None:
    """Brute force over whole models; and the work is what the published program's formula says."""
    removed: list[int] = []
    result = run(SlebScore.model_validate({"layers": 3, "prefix": prefix}), tmp_path, model, calibration)
    for decision in result.scores.decisions:
        with torch.no_grad():
            left = [layer for layer in range(1, LAYERS - 1) if layer not in removed]
            expected = {layer: float(mean_loss(whole, calibration, [*removed, layer])) for layer in left}
        assert decision.scores == pytest.approx(expected, rel=1e-5)
        assert decision.removed == min(expected, key=expected.__getitem__)
        removed.append(decision.removed)
    published = sum((LAYERS - 2 - done) * (LAYERS - 1 - done) for done in range(3))
    chosen = run_stage(Prune(layers=2, among="expressible"), tmp_path, model=model, scores=result.scores).model
    first = result.scores.decisions[0].scores
    assert set(chosen.removed) == set(sorted(first, key=first.__getitem__)[:2])  # protected layers stay, though they have no score
    if prefix == "computed":
        bottom = sum(part.layer_forwards for part in result.work.rounds) - published
        assert 0 < bottom <= 3 * LAYERS  # what enters each candidate is still computed, once a round at most
    else:
        assert result.work.layer_evaluations < 0.75 * published


def test_scores_in_parts_are_those_of_the_whole(model: ModelGraph, calibration: CalibrationSet, tmp_path: Path) -> None:
    """Sums over samples: two halves add up to what both give together."""
    from gradmap_plugins.perplexity_score import measure_losses

    from gradmap_pipeline.batches import make_batches
    from gradmap_pipeline.sweep.layerwise import LayerwiseModel
    from gradmap_pipeline.sweep.sample_pass import SamplePass

    ids, mask = calibration.load()
    layerwise = LayerwiseModel(model)
    whole = SamplePass(layerwise, make_batches(ids, mask))
    together = measure_losses(whole)
    parts = [
        measure_losses(SamplePass(layerwise, make_batches(some, real), predicted=whole.predicted))
        for some, real in zip(ids.split(3), mask.split(3), strict=True)
    ]
    assert {layer: parts[0][layer] + parts[1][layer] for layer in together} == pytest.approx(together, rel=1e-5)
    layerwise.weights.is_resident = False
    assert measure_losses(SamplePass(layerwise, make_batches(ids, mask, 48))) == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize("power", [1, 2])
def test_magnitude(power: int, model: ModelGraph, whole: Any, tmp_path: Path) -> None:
    scores = run_stage(MagnitudeScore(layers=2, power=power), tmp_path, model=model).scores
    expected = {
        index: sum(float((weight.detach().abs() ** power).sum()) for weight in layer.parameters())
        for index, layer in enumerate(whole.model.layers)
    }
    assert scores.decisions[0].scores == pytest.approx(expected, rel=1e-6)


def test_random_and_last_layers(model: ModelGraph, tmp_path: Path) -> None:
    def order(stage: Any, seed: int = 0) -> tuple[int, ...]:
        scores = run_stage(stage, tmp_path, seed=seed, model=model).scores
        assert isinstance(scores, LayerScores)
        return scores.order

    draws = {order(RandomScore(layers=4, draw=draw)) for draw in range(8)}
    assert len(draws) > 3
    assert all(set(draw) == {1, 2, 3, 4} for draw in draws)
    assert order(RandomScore(layers=4)) == (3, 4, 1, 2), "what Python's generator gives for seed 0, on every machine"
    assert len({order(RandomScore(layers=4), seed) for seed in range(8)}) > 3
    assert order(LastLayersScore(layers=3)) == (5, 4, 3)
    assert order(LastLayersScore(layers=3, protect_last=1)) == (4, 3, 2)
