"""Scores against their formulas in fp64 and against plain autograd; decisions against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.gradmap_score import GradmapScore, gate_importance, update_importance, weight_importance
from pydantic import ValidationError
from tiny import make_model
from transformers import AutoModelForCausalLM

from gradmap_pipeline import CalibrationSet, Forecasts, ModelForecast, ModelGraph, OptionError, StageError, TensorFile
from gradmap_pipeline.batches import make_batches
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.sample_pass import SamplePass
from gradmap_pipeline.testing import make_context, run_stage


@pytest.fixture(scope="module")
def model(llama: Path) -> ModelGraph:
    return open_folder(llama)


@pytest.fixture(scope="module")
def calibration(model: ModelGraph, text: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 6, "sequence_length": 24})
    return run_stage(stage, tmp_path_factory.mktemp("calibration"), model=model).calibration


def test_gate_importance_is_the_gates_derivative_per_token() -> None:
    """Against autograd: a scalar gate on each token's update, of a loss that is any function of the output."""
    generator = torch.Generator().manual_seed(0)
    hidden, update, weight = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    gates = torch.ones(2, 5, 1, dtype=torch.float64, requires_grad=True)
    output = hidden + gates * update
    loss = (output * weight).sin().sum()
    (by_gate,) = torch.autograd.grad(loss, gates, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, output)
    assert gate_importance(gradient, update, mask) == pytest.approx(float(by_gate[..., 0][mask].abs().sum()), rel=1e-6)


def test_update_importance_bounds_gate_importance() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, update = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    mask = torch.ones(2, 5, dtype=torch.bool)
    by_hand = sum(gradient[b, t].norm() * update[b, t].norm() for b in range(2) for t in range(5))
    assert update_importance(gradient, update, mask) == pytest.approx(float(by_hand), rel=1e-6)
    assert gate_importance(gradient, update, mask) <= update_importance(gradient, update, mask)


def test_weight_importance_by_hand() -> None:
    gradients = [torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0]])]
    weights = [torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5]])]
    assert weight_importance(gradients, weights, "l1", "none") == 5
    assert weight_importance(gradients, weights, "l2", "none") == pytest.approx(3)
    assert weight_importance(gradients, weights, "l1", "taylor") == 3 + 2 + 1
    assert weight_importance(gradients, weights, "l2", "taylor") == pytest.approx((9 + 4 + 1) ** 0.5)


def plain_scores(folder: Path, calibration: CalibrationSet, metric: str, kept: list[int]) -> dict[int, float]:
    """The same scores from one ordinary backward pass over all samples at once, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids, _ = calibration.load()
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def listen(index: int) -> Any:
        def hook(_module: Any, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            output.retain_grad()
            inputs[index], outputs[index] = arguments[0], output

        return hook

    for index, layer in enumerate(model.model.layers):
        if index not in kept:
            layer.forward = lambda hidden_states, *_, **__: hidden_states
        layer.register_forward_hook(listen(index))
    model(input_ids=ids, labels=ids).loss.backward()
    if metric == "weight_gradient":
        return {
            index: sum(float(p.grad.square().sum()) for p in model.model.layers[index].parameters() if p.ndim == 2) ** 0.5
            for index in kept
        }
    gradients = {index: outputs[index].grad for index in kept}
    updates = {index: outputs[index] - inputs[index] for index in kept}
    if metric == "gate_gradient":
        return {index: float((gradients[index] * updates[index].detach()).sum(-1).abs().sum()) for index in kept}
    return {index: float((gradients[index].norm(dim=-1) * updates[index].detach().norm(dim=-1)).sum()) for index in kept}


@pytest.mark.parametrize("metric", ["gate_gradient", "update_gradient", "weight_gradient"])
def test_iterative_scores_equal_plain_backward(
    llama: Path, model: ModelGraph, calibration: CalibrationSet, metric: str, tmp_path: Path
) -> None:
    stage = GradmapScore.model_validate({"metric": metric, "sample_share": 1.0, "layers": 2})
    scores = run_stage(stage, tmp_path, model=model, calibration=calibration).scores
    kept = [0, 1, 2, 3]
    for decision in scores.decisions:
        expected = plain_scores(llama, calibration, metric, kept)
        assert decision.scores == pytest.approx(expected, rel=1e-4)
        assert decision.removed == min([layer for layer in kept if layer in (1, 2)], key=expected.__getitem__)
        assert decision.removed_if_unprotected == min(expected, key=expected.__getitem__)
        kept.remove(decision.removed)


def test_one_shot_ranks_once(model: ModelGraph, calibration: CalibrationSet, tmp_path: Path) -> None:
    options = {"schedule": "one_shot", "layers": 3, "protect_first": 0, "protect_last": 0}
    scores = run_stage(GradmapScore.model_validate(options), tmp_path, model=model, calibration=calibration).scores
    first = scores.decisions[0].scores
    assert list(scores.order) == sorted(first, key=first.__getitem__)[:3]
    assert all(decision.scores.items() <= first.items() for decision in scores.decisions)


def test_decisions_are_remembered_one_by_one(model: ModelGraph, calibration: CalibrationSet, tmp_path: Path) -> None:
    """A run that was stopped after two decisions goes on with the third, and decides as an undisturbed run does."""
    from dataclasses import replace

    kept: dict[str, Any] = {}
    computed = []

    def remember(key: Any, compute: Any) -> Any:
        if str(key) not in kept:
            computed.append(key["kept"])
            kept[str(key)] = compute()
        return kept[str(key)]

    context = replace(make_context(tmp_path), remember=remember)
    inputs = GradmapScore.Inputs(model=model, calibration=calibration)
    options = {"protect_first": 0, "protect_last": 0}
    GradmapScore.model_validate({**options, "layers": 2}).run(inputs, context)
    assert len(computed) == 2
    resumed = GradmapScore.model_validate({**options, "layers": 3}).run(inputs, context).scores
    assert len(computed) == 3
    assert (
        resumed.decisions
        == run_stage(
            GradmapScore.model_validate({**options, "layers": 3}), tmp_path, model=model, calibration=calibration
        ).scores.decisions
    )


def test_already_pruned_model_is_scored_on_its_own_layers(model: ModelGraph, calibration: CalibrationSet, tmp_path: Path) -> None:
    pruned = model.without_layers([1])
    scores = run_stage(GradmapScore(layers=1), tmp_path, model=pruned, calibration=calibration).scores
    assert scores.decisions[0].scores.keys() == {0, 2, 3}
    assert scores.order == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.2, "layers": 2}, "give 'ratio' or 'layers', not both"),
        ({"norm": "l1"}, "'norm' belongs to metric 'weight_gradient'; the metric is 'gate_gradient'"),
        ({"metric": "update_gradient", "weighting": "taylor"}, "'weighting' belongs to metric 'weight_gradient'"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GradmapScore.model_validate(options)


def test_more_decisions_than_free_layers() -> None:
    with pytest.raises(OptionError, match=r"3 of 4 layers are to be scored for removal, but only 2 are not protected") as caught:
        GradmapScore(layers=3).forecast(Forecasts(GradmapScore, model=ModelForecast(layers=4)))
    assert caught.value.option == "layers"


def test_half_precision_does_not_lose_small_gradients(model: ModelGraph, calibration: CalibrationSet) -> None:
    """As part of a hundred million tokens: gradients of their mean are below what float16 can hold."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for dtype in ("float32", "float16"):
        one = SamplePass(LayerwiseModel(model, dtype=dtype), make_batches(*calibration.load()), predicted=10**8)
        gradients[dtype] = [visit.gradient.float() for step in one.backward() for visit in step]
    assert len(gradients["float32"]) == 4
    for single, half in zip(*gradients.values(), strict=True):
        assert 0 < (half - single).norm() < 0.03 * single.norm()


def test_scores_that_are_no_numbers(model: ModelGraph, calibration: CalibrationSet, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    patch = TensorFile.save({name: torch.full((32, 64), float("nan"))}, tmp_path / "patch.safetensors")
    with pytest.raises(StageError, match=r"score of layer \d is not a finite number: .*2.mlp.down_proj.weight' of layer 2"):
        run_stage(GradmapScore(layers=1), tmp_path, model=model.with_patches({name: patch}, "broken"), calibration=calibration)


def test_other_tokenizer_is_refused(calibration: CalibrationSet, model: ModelGraph, tmp_path: Path) -> None:
    other = calibration.model_copy(update={"tokenizer": "0" * 64})
    with pytest.raises(StageError, match="made with another tokenizer"):
        run_stage(GradmapScore(), tmp_path, model=model, calibration=other)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_other_architectures(architecture: str, text: Path, tmp_path: Path) -> None:
    model = open_folder(make_model(tmp_path / "model", architecture))
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 4, "sequence_length": 24})
    calibration = run_stage(stage, tmp_path / "calibration", model=model).calibration
    scores = run_stage(GradmapScore(layers=2), tmp_path, model=model, calibration=calibration).scores
    assert set(scores.order) == {1, 2}
