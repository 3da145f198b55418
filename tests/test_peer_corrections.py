"""Corrections of other methods, against their formulas computed from whole models in another way."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradmap_plugins import mka_merge
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.export import ExportModel
from gradmap_plugins.linearpatch_compensate import LinearpatchCompensate, make_hadamard
from gradmap_plugins.mean_bias import MeanBias
from gradmap_plugins.mka_merge import Merge, MkaMerge, diffusion_map, information, likeness, merge_weights
from gradmap_plugins.project_compensate import ProjectCompensate
from gradmap_plugins.replaceme_compensate import ReplacemeCompensate
from tiny import make_model
from transformers import AutoModelForCausalLM
from walk import make_model as make_any_model

from gradmap_pipeline import (
    CalibrationForecast,
    CalibrationSet,
    Forecasts,
    ModelError,
    ModelForecast,
    ModelGraph,
    OptionError,
    StageError,
)
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.stages.structure_probe import StructureProbe
from gradmap_pipeline.testing import make_context, run_stage

LAYERS = 5


def make_inputs(folder: Path, text: Path, architecture: str = "llama") -> tuple[ModelGraph, CalibrationSet]:
    depth = {"gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    model = open_folder(make_model(folder / "model", architecture, **{depth: LAYERS}))
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 24, "sequence_length": 48})
    return model, run_stage(stage, folder / "calibration", model=model).calibration


def watch(model: Any, layers: str, names: tuple[str, ...], ids: torch.Tensor, removed: tuple[int, ...] = ()) -> dict[str, Any]:
    """Run a whole model without some layers; `in 2`, `out 2` of layers and of modules inside, `in 2 mlp`, flattened to (N, D)."""
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: Any, named: Any, output: Any) -> None:
            seen[f"in {name}"] = (inputs[0] if inputs else named["hidden_states"]).flatten(0, -2)
            seen[f"out {name}"] = (output[0] if isinstance(output, tuple) else output).flatten(0, -2)

        return hook

    kept = {}
    for index, layer in enumerate(model.get_submodule(layers)):
        if index in removed:
            kept[index] = layer.forward
            layer.forward = lambda hidden_states, *_args, **_named: hidden_states
            continue
        handles.append(layer.register_forward_hook(keep(str(index)), with_kwargs=True))
        handles += [layer.get_submodule(name).register_forward_hook(keep(f"{index} {name}"), with_kwargs=True) for name in names]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    for index, forward in kept.items():
        model.get_submodule(layers)[index].forward = forward
    return seen


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_replaceme_is_its_closed_form(ridge: float, text: Path, tmp_path: Path) -> None:
    """A = (MᵀM + λI)⁻¹ Mᵀ(H_n - H_i + M), W ← AᵀW at each cut; the second on the model that has the first."""
    model, calibration = make_inputs(tmp_path, text)
    result = run_stage(ReplacemeCompensate(ridge=ridge), tmp_path, model=model.without_layers([1, 3]), calibration=calibration)
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64).eval()
    ids, _ = calibration.load()
    dense = watch(whole, "model.layers", ("mlp",), ids)
    for layer, after in ((0, "in 2"), (2, "in 4")):
        pruned = watch(whole, "model.layers", ("mlp",), ids, removed=(1, 3))
        m, missing = pruned[f"out {layer} mlp"], dense[after] - pruned[f"out {layer}"]
        penalty = math.sqrt(ridge * float(m.square().sum()) / m.shape[1])
        augmented = torch.cat([m, penalty * torch.eye(m.shape[1]).double()])
        target = torch.cat([missing + m, torch.zeros(m.shape[1], m.shape[1]).double()])
        factor = torch.linalg.lstsq(augmented, target).solution
        down = whole.model.layers[layer].mlp.down_proj.weight
        expected = factor.T @ down.detach()
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        corrected = result.model.patches[name].load()[name].double()
        assert (corrected - expected).norm() <= 1e-4 * (expected - down.detach()).norm()
        (site,) = [site for site in result.compensation.sites if site.layer == layer]
        left = (missing + m - m @ factor).square().sum() / missing.square().sum()
        assert site.missing_left == pytest.approx(float(left), rel=1e-3)
        down.data = corrected


def test_replaceme_needs_a_layer_below(text: Path, tmp_path: Path) -> None:
    model, calibration = make_inputs(tmp_path, text)
    stage = ReplacemeCompensate()
    with pytest.raises(StageError, match="this correction needs a kept layer below a removed one, and there is none"):
        run_stage(stage, tmp_path, model=model.without_layers([0]), calibration=calibration)
    with pytest.raises(StageError, match="the model has all its layers, so there is nothing to correct"):
        run_stage(stage, tmp_path, model=model, calibration=calibration)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 32, 36, 40, 60, 64, 96, 192, 288])
def test_hadamard_matrices(size: int) -> None:
    matrix = make_hadamard(size)
    assert set(matrix.flatten().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


def test_no_hadamard_matrix() -> None:
    with pytest.raises(StageError, match="needs a Hadamard matrix of the hidden size; none of size 3 is known here"):
        make_hadamard(6)


def test_linearpatch_is_its_formula_and_folded_by_least_squares(text: Path, tmp_path: Path) -> None:
    model, calibration = make_inputs(tmp_path, text)
    pruned = model.without_layers([2, 3])
    result = run_stage(LinearpatchCompensate(tolerance=1.0), tmp_path, model=pruned, calibration=calibration)
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64).eval()
    ids, _ = calibration.load()
    seen = watch(whole, "model.layers", ("mlp.down_proj",), ids)
    hidden, rotation = 32, make_hadamard(32) / math.sqrt(32)
    before, after = (seen[name].view(*ids.shape, hidden) @ rotation for name in ("out 1", "in 4"))
    ratios = (after.abs().mean(1) / before.abs().mean(1)).mean(0)
    patch = rotation @ torch.diag(ratios) @ rotation.T
    added = seen["out 1"] @ patch - seen["out 1"]
    inputs = seen["in 1 mlp.down_proj"]
    fitted = torch.linalg.lstsq(inputs, added).solution
    weight = whole.model.layers[1].mlp.down_proj.weight.detach()
    name = "model.layers.1.mlp.down_proj.weight"
    corrected = result.model.patches[name].load()[name].double()
    assert (corrected - weight - fitted.T).norm() <= 1e-3 * fitted.norm()
    (site,) = result.compensation.sites
    left = float((added - inputs @ fitted).square().sum() / added.square().sum())
    assert site.missing_left == pytest.approx(left, rel=1e-3)
    assert left > 0.01
    with pytest.raises(
        StageError, match=rf"the patch after layer 1 cannot be folded into mlp\.down_proj\.weight: {left:.0%} of what"
    ):
        run_stage(LinearpatchCompensate(tolerance=0.01), tmp_path, model=pruned, calibration=calibration)


@pytest.mark.parametrize(
    ("architecture", "layers", "bias"), [("gpt2", "transformer.h", "mlp.c_proj"), ("opt", "model.decoder.layers", "fc2")]
)
def test_mean_bias_takes_the_mean_away(architecture: str, layers: str, bias: str, text: Path, tmp_path: Path) -> None:
    """In the exported model, the mean of what leaves each kept layer is what it is in the whole model."""
    model, calibration = make_inputs(tmp_path, text, architecture)
    pruned = model.without_layers([2])
    result = run_stage(MeanBias(), tmp_path / "out", model=pruned, calibration=calibration)
    assert [site.parameter for site in result.compensation.sites] == [f"{bias}.bias"] * 3
    run_stage(ExportModel(to=tmp_path / "folder"), tmp_path / "export", model=result.model)
    ids, _ = calibration.load()
    dense, moved = (
        watch(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), layers, (), ids)
        for folder in (model.base.folder, tmp_path / "folder")
    )
    for number, after in ((1, "in 3"), (2, "in 4"), (3, "out 4")):
        shift = (moved[f"out {number}"] - dense[after]).mean(0).norm()
        assert float(shift) < 1e-5 * float(dense[after].norm(dim=-1).mean())


def test_mean_bias_adds_no_parameter(text: Path, tmp_path: Path) -> None:
    model, _ = make_inputs(tmp_path, text)
    with pytest.raises(
        ModelError, match="no layer has a place that mean_bias could correct: a bias where it writes to its output, without which"
    ):
        MeanBias().inspect(Forecasts(MeanBias), StructureProbe(model, 1 << 30))


def test_attention_is_corrected_for_what_was_missing_before(text: Path, tmp_path: Path) -> None:
    """Each layer in order, attention first; by independent least squares on whole models that have all corrections so far."""
    model, calibration = make_inputs(tmp_path, text)
    pruned = model.without_layers([1])
    result = run_stage(ProjectCompensate(ridge=0.2, shrink=0.4), tmp_path, model=pruned, calibration=calibration)
    sites = [(site.layer, site.parameter.removesuffix(".weight")) for site in result.compensation.sites]
    assert sites == [(0, "mlp.down_proj")] + [(n, name) for n in (2, 3, 4) for name in ("self_attn.o_proj", "mlp.down_proj")]
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64).eval()
    ids, _ = calibration.load()
    names = ("self_attn.o_proj", "mlp.down_proj")
    dense = watch(whole, "model.layers", names, ids)
    for layer, name in sites:
        seen = watch(whole, "model.layers", names, ids, removed=(1,))
        after = {0: "in 2", 2: "in 3", 3: "in 4", 4: "out 4"}[layer]
        missing = dense[f"in {layer}"] - seen[f"in {layer}"] if name == names[0] else dense[after] - seen[f"out {layer}"]
        inputs = seen[f"in {layer} {name}"]
        penalty = math.sqrt(0.2 * float(inputs.square().sum()) / inputs.shape[1])
        augmented = torch.cat([inputs, penalty * torch.eye(inputs.shape[1]).double()])
        x = torch.linalg.lstsq(augmented, torch.cat([missing, torch.zeros(inputs.shape[1], 32).double()])).solution
        explained = 1 - float((missing - inputs @ x).square().sum() / missing.square().sum())
        x = x * explained / (explained + 0.4)  # what explains little is held back
        (told,) = [site for site in result.compensation.sites if (site.layer, site.parameter) == (layer, f"{name}.weight")]
        left = float((missing - inputs @ x).square().sum() / missing.square().sum())
        assert told.missing_left == pytest.approx(left, rel=1e-4)
        weight = whole.model.layers[layer].get_submodule(name).weight
        full = f"model.layers.{layer}.{name}.weight"
        corrected = result.model.patches[full].load()[full].double()
        assert (corrected - weight.detach() - x.T).norm() <= 1e-3 * x.norm(), (layer, name)
        weight.data = corrected
    assert result.work.layer_evaluations == LAYERS + len(sites)  # the whole model, and each site: the last of a layer goes on


def test_diffusion_map_keeps_neighbours_together() -> None:
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(0, 1, (40, 6)), generator.normal(12, 1, (40, 6))])
    coordinates = diffusion_map(points)
    assert coordinates.shape == (80, 2)
    first, second = coordinates[:40, 0], coordinates[40:, 0]
    assert abs(first.mean() - second.mean()) > 5 * max(first.std(), second.std())


def test_information_of_a_known_density() -> None:
    """Of normal variables with correlation r, -log(1 - r²) / 2; here the other three pairs of coordinates are independent."""
    generator = np.random.default_rng(0)
    one, noise = generator.normal(size=(3000, 2)), generator.normal(size=(3000, 2))
    other = np.stack([0.8 * one[:, 0] + 0.6 * noise[:, 0], noise[:, 1]], axis=1)
    assert information(one, other) == pytest.approx(-math.log(1 - 0.8**2) / 2 / 4, abs=0.02)


def test_likeness_orders_pairs() -> None:
    generator = np.random.default_rng(0)
    one = generator.normal(size=(200, 2))
    near, far = one + 0.1 * generator.normal(size=one.shape), generator.normal(size=one.shape)
    assert likeness(one, one) == pytest.approx(1, abs=1e-6)
    assert 1 > likeness(one, near) > likeness(one, far) >= 0
    clustered = np.round(one) + 1e-4 * generator.normal(size=one.shape)  # whose differential entropy is negative
    assert 0 < likeness(one, clustered) < 1


def test_mka_merges_weights(text: Path, tmp_path: Path) -> None:
    model, calibration = make_inputs(tmp_path, text)
    result = run_stage(MkaMerge(layers=2), tmp_path / "merge", model=model, calibration=calibration)
    assert len(result.model.layers) == LAYERS - 2
    assert result.model.label == "merged"
    assert result.model.removed == tuple(sorted(merge.merged for merge in result.merges.merges))
    run_stage(ExportModel(to=tmp_path / "folder"), tmp_path / "export", model=result.model)


def test_merging_twice_into_one_layer(text: Path, tmp_path: Path) -> None:
    model, _ = make_inputs(tmp_path, text)
    merges = [Merge(into=2, merged=3, share=0.75), Merge(into=1, merged=2, share=0.5)]
    patches = merge_weights(model, merges, make_context(tmp_path / "merge"))
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64)
    weights = [layer.self_attn.q_proj.weight.detach() for layer in whole.model.layers]
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = 0.5 * weights[1] + 0.5 * (0.75 * weights[2] + 0.25 * weights[3])
    torch.testing.assert_close(patches[name].load()[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert not any(".layers.2." in name for name in patches)


def test_merging_holds_a_tensor_of_a_layer_at_a_time(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, however many layers are merged into others: 1 into 0 and 3 into 2, and what has become of 2 into that of 0."""
    model, _ = make_inputs(tmp_path, text)
    living: list[int] = []
    load = mka_merge.load_tensor

    def count(stored: Any) -> torch.Tensor:
        tensor: torch.Tensor = load(stored)
        living.append(sum(type(one) is torch.Tensor and one.dtype == torch.float64 for one in gc.get_objects()))
        return tensor

    monkeypatch.setattr(mka_merge, "load_tensor", count)
    merges = [Merge(into=0, merged=1, share=0.75), Merge(into=2, merged=3, share=0.5), Merge(into=0, merged=2, share=0.25)]
    patches = merge_weights(model, merges, make_context(tmp_path / "merge"))
    assert len(patches) == len(model.layer_tensors(0))
    assert len(living) == 4 * len(patches)
    assert max(living) - min(living) == 2
    name = "model.layers.0.self_attn.q_proj.weight"
    q = [model.stored_tensor(name.replace(".0.", f".{layer}.")) for layer in range(4)]
    zero, one, two, three = (load(each).double() for each in q)
    expected = 0.25 * (0.75 * zero + 0.25 * one) + 0.75 * (0.5 * two + 0.5 * three)
    torch.testing.assert_close(patches[name].load()[name].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", [ReplacemeCompensate(), LinearpatchCompensate()])
def test_no_linear_map_to_the_output_is_told_before_a_step_runs(stage: Any, tmp_path: Path) -> None:
    """OLMo 2 writes to the residual stream through norms alone."""
    model = open_folder(make_any_model(tmp_path / "model", "olmo2"))
    with pytest.raises(ModelError, match=f"no layer has a place that {stage.name} could correct: a linear map that writes to the"):
        stage.inspect(Forecasts(type(stage)), StructureProbe(model, 1 << 30))


def test_corrections_that_are_not_finite_are_refused(text: Path, tmp_path: Path) -> None:
    from gradmap_pipeline.correction.patches import write_patches
    from gradmap_pipeline.correction.streams import open_streams

    model, calibration = make_inputs(tmp_path, text)
    context = make_context(tmp_path / "out")
    streams = open_streams(model.without_layers([1]), calibration, context, 0)
    broken = {"mlp.down_proj.weight": torch.full((32, 64), torch.nan)}
    with pytest.raises(
        StageError, match=r"correction of .*0.mlp.down_proj.weight' is not finite, computed in float32; raise 'ridge'"
    ):
        write_patches(streams, 0, broken, context)


def test_too_few_samples_to_compare_layers() -> None:
    known = Forecasts(MkaMerge, model=ModelForecast(layers=6), calibration=CalibrationForecast(samples=5))
    with pytest.raises(OptionError, match="layers are compared by 5 neighbours of each sample; calibrate on more samples"):
        MkaMerge().forecast(known)
