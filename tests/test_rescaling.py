"""The residual stream multiplied at cuts, inside the weights that write to it: exact on logits, and refused where it is not."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.linearpatch_compensate import LinearpatchCompensate, make_hadamard
from gradmap_plugins.project_compensate import ProjectCompensate
from gradmap_plugins.prunecomp_compensate import PrunecompCompensate
from tiny import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from walk import make_model as make_any_model

from gradmap_pipeline import CalibrationSet, ModelError, ModelGraph, StageError, load_tensor, magnitude_ratio, nearest_scale
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.skeleton import find_layer_list
from gradmap_pipeline.checkpoint.whole import load_whole
from gradmap_pipeline.cli import app
from gradmap_pipeline.correction.writers import divide_writers
from gradmap_pipeline.stages.structure_probe import StructureProbe
from gradmap_pipeline.testing import run_stage

MEMORY = 4 << 30


def make_inputs(folder: Path, text: Path) -> tuple[ModelGraph, CalibrationSet]:
    model = open_folder(make_model(folder / "model", num_hidden_layers=6, tied=True))
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 12, "sequence_length": 32})
    return model, run_stage(stage, folder / "calibration", model=model).calibration


@pytest.mark.parametrize(
    ("architecture", "writers", "error"),
    [
        # Norms of RMSNorm compute in float32, whatever the model is in.
        ("llama", ["mlp.down_proj", "self_attn.o_proj"], 2e-5),
        ("granite", ["mlp.down_proj", "self_attn.o_proj"], 2e-5),
        ("gemma2", ["post_attention_layernorm", "post_feedforward_layernorm"], 2e-5),
        ("gemma3_text", ["post_attention_layernorm", "post_feedforward_layernorm"], 2e-5),
        ("gpt2", ["attn.c_proj", "mlp.c_proj"], 1e-9),
        ("opt", ["fc2", "self_attn.out_proj"], 1e-9),
        ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"], 1e-9),
        ("phi", ["mlp.fc2", "self_attn.dense"], 1e-9),
        ("falcon", ["mlp.dense_4h_to_h", "self_attention.dense"], 1e-9),
    ],
)
def test_divided_writers_multiply_the_stream(architecture: str, writers: list[str], error: float, tmp_path: Path) -> None:
    """Logits, in fp64, against those of a model whose stream is multiplied by a hook. Epsilons of norms are made small."""
    folder, scale, cut = make_any_model(tmp_path / "model", architecture), 1.7, 1
    graph = open_folder(folder)
    found = StructureProbe(graph, MEMORY).find_writers()
    assert [sorted(writer.name for writer in found[layer]) for layer in graph.layers] == [writers] * len(graph.layers)
    gemma = architecture.startswith("gemma")
    assert {writer.offset for layer in found.values() for writer in layer} == {1.0 if gemma else 0.0}
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))

    def make() -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms that are not as they start
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for module in model.modules():
            for name in ("eps", "variance_epsilon"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 1e-30)
        _, layers = find_layer_list(model, graph.base.layers, graph.base.layer_prefix)
        return model, layers

    def multiply(_module: Any, positional: Any, named: Any) -> Any:
        if "hidden_states" in named:
            return positional, {**named, "hidden_states": named["hidden_states"] * scale}
        return (positional[0] * scale, *positional[1:]), named

    with torch.no_grad():
        plain, layers = make()
        before = plain(input_ids=ids).logits
        layers[cut].register_forward_pre_hook(multiply, with_kwargs=True)
        wanted = plain(input_ids=ids).logits
        divided, layers = make()
        for index in range(cut, len(layers)):
            for name, value in divide_writers(layers[index], found[index], scale).items():
                layers[index].get_parameter(name).data = value
        got = divided(input_ids=ids).logits
    assert (got - wanted).abs().max() <= error * wanted.abs().max()
    assert (before - wanted).abs().max() > 100 * error * wanted.abs().max()


@pytest.mark.parametrize("architecture", ["olmo2", "mixtral", "bloom-after", "opt-350m"])
def test_models_that_see_the_size_of_the_stream_are_refused(architecture: str, tmp_path: Path) -> None:
    name, _, variant = architecture.partition("-")
    changes = {"after": {"apply_residual_connection_post_layernorm": True}, "350m": {"do_layer_norm_before": False}}.get(
        variant, {}
    )
    graph = open_folder(make_any_model(tmp_path / "model", name, **changes))
    with pytest.raises(
        ModelError, match=r"(layer \d|the head) of \w+ depends on the size of the residual stream.*cannot be rescaled"
    ):
        StructureProbe(graph, MEMORY).find_writers()


def test_the_nearest_scale_is_that_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10, 100])[:, None, None]
    pruned = original / 1.4 + 0.1 * torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    pruned[0, 3:] = 1e9  # padding counts nowhere
    sizes = original[mask].norm(dim=-1, keepdim=True)
    wanted = torch.linalg.lstsq((pruned[mask] / sizes).reshape(-1, 1), (original[mask] / sizes).reshape(-1, 1)).solution
    above, below = nearest_scale(pruned, original, mask)
    assert above / below == pytest.approx(float(wanted), rel=1e-12)


def test_the_magnitude_ratio_is_that_of_the_paper() -> None:
    """For each sample and channel the ratio of mean magnitudes over tokens; their mean."""
    generator = torch.Generator().manual_seed(0)
    pruned, original = (torch.randn(3, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2:] = False
    ratios = []
    for sample, tokens in enumerate((5, 2, 5)):
        for channel in range(8):
            sums = [sum(abs(float(hidden[sample, token, channel])) for token in range(tokens)) for hidden in (pruned, original)]
            ratios.append(sums[1] / sums[0])
    above, below = magnitude_ratio(pruned, original, mask)
    assert above / below == pytest.approx(sum(ratios) / len(ratios), rel=1e-12)


def hidden_of(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What enters each layer, and what leaves the last before the final norm: (samples, T, D) each."""
    seen: list[torch.Tensor] = []

    def keep(_module: Any, inputs: Any, named: Any) -> None:
        seen.append((inputs[0] if inputs else named["hidden_states"]).detach())

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.model.layers]
    handles.append(model.model.norm.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return tuple(seen)


def multiplying(model: Any, place: int, scale: float) -> None:
    """From now on the stream of a model is multiplied before the layer at a place."""

    def multiply(_module: Any, positional: Any, named: Any) -> Any:
        if positional:
            return (positional[0] * scale, *positional[1:]), named
        return positional, {**named, "hidden_states": named["hidden_states"] * scale}

    model.model.layers[place].register_forward_pre_hook(multiply, with_kwargs=True, prepend=True)


def test_prunecomp_is_its_formula(text: Path, tmp_path: Path) -> None:
    """Against hidden states of the original and of a pruned model that hooks multiply where layers are missing; tied embeddings."""
    model, calibration = make_inputs(tmp_path, text)
    pruned = model.without_layers([0, 2, 3])
    result = run_stage(PrunecompCompensate(), tmp_path / "step", model=pruned, calibration=calibration)
    ids, _ = calibration.load()
    dense, reference = load_whole(model, "float32"), load_whole(pruned, "float32")
    originals, total = hidden_of(dense, ids), 1.0
    for place, layer in ((0, 1), (1, 4)):
        hidden = hidden_of(reference, ids)[place]
        ratio = float((originals[layer].abs().mean(1) / hidden.abs().mean(1)).mean())
        multiplying(reference, place, ratio)
        total *= ratio
        assert result.compensation.scales[layer] == pytest.approx(total, rel=1e-3)
    got = load_whole(result.model, "float32")
    with torch.no_grad():
        wanted, before = (each(input_ids=ids).logits for each in (reference, load_whole(pruned, "float32")))
        logits = got(input_ids=ids).logits
    assert (logits - wanted).norm() <= 2e-3 * wanted.norm()
    assert (before - wanted).norm() > 0.02 * wanted.norm()
    assert not any("embed" in name or "lm_head" in name for name in result.model.patches)
    assert result.compensation.sites == ()


def test_what_is_corrected_after_rescaling_is_the_rest(text: Path, tmp_path: Path) -> None:
    """Normal equations at the last layer: its inputs are orthogonal to what is missing from the original over the scale."""
    model, calibration = make_inputs(tmp_path, text)
    pruned = model.without_layers([2, 3])
    options = {"ridge": 1e-9, "shrink": 0.0, "attention": False}
    result = run_stage(ProjectCompensate(**options, rescale=True), tmp_path / "a", model=pruned, calibration=calibration)
    plain = run_stage(ProjectCompensate(**options), tmp_path / "b", model=pruned, calibration=calibration)
    (scale,) = result.compensation.scales.values()
    assert list(result.compensation.scales) == [4]
    assert plain.compensation.scales == {}
    ids, _ = calibration.load()
    target = hidden_of(load_whole(model, "float32"), ids)[-1].double()
    share = {}
    for name, graph, size in (("rescaled", result.model, scale), ("wrong", result.model, 1.0), ("plain", plain.model, 1.0)):
        corrected = load_whole(graph, "float32")
        entered: list[torch.Tensor] = []
        handle = corrected.model.layers[-1].mlp.down_proj.register_forward_pre_hook(
            lambda _module, inputs, entered=entered: entered.append(inputs[0])
        )
        left = target / size - hidden_of(corrected, ids)[-1].double()
        handle.remove()
        a, r = entered[0].double().flatten(0, 1), left.flatten(0, 1)
        share[name] = float((a.T @ r).norm() / (a.norm() * r.norm()))
    assert share["rescaled"] < 1e-4
    assert share["plain"] < 1e-4
    assert share["wrong"] > 1e-3


def test_linearpatch_fits_what_is_no_multiple(text: Path, tmp_path: Path) -> None:
    """s is that of least squares, the down-projection gets x(P/s - I), and the stream is divided above."""
    model, calibration = make_inputs(tmp_path, text)
    pruned = model.without_layers([2, 3])
    result = run_stage(LinearpatchCompensate(tolerance=1.0, rescale=True), tmp_path / "a", model=pruned, calibration=calibration)
    fitted_alone = run_stage(LinearpatchCompensate(tolerance=1.0), tmp_path / "b", model=pruned, calibration=calibration)
    ids, _ = calibration.load()
    dense = load_whole(model, "float32")
    entered: list[torch.Tensor] = []
    dense.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: entered.append(inputs[0]))
    originals = hidden_of(dense, ids)
    x, y, a = originals[2].double(), originals[4].double(), entered[0].double().flatten(0, 1)
    rotation = make_hadamard(32) / 32**0.5
    ratios = ((y @ rotation).abs().mean(1) / (x @ rotation).abs().mean(1)).mean(0)
    patch = rotation @ torch.diag(ratios) @ rotation.T
    flat = x.flatten(0, 1)
    scale = float(torch.linalg.lstsq(flat.reshape(-1, 1), (flat @ patch).reshape(-1, 1)).solution)
    assert result.compensation.scales == {4: pytest.approx(scale, rel=1e-4)}
    rest = flat @ patch / scale - flat
    fit = torch.linalg.lstsq(a, rest).solution
    left = scale**2 * float((rest - a @ fit).square().sum() / (flat @ patch - flat).square().sum())
    (site,) = result.compensation.sites
    assert site.missing_left == pytest.approx(left, rel=1e-3)
    (alone,) = fitted_alone.compensation.sites
    assert site.missing_left < 0.9 * alone.missing_left
    name = "model.layers.1.mlp.down_proj.weight"
    change = result.model.patches[name].load()[name].double() - dense.model.layers[1].mlp.down_proj.weight.double()
    assert (change - fit.T).norm() <= 1e-3 * fit.norm()
    between = (site.missing_left + alone.missing_left) / 2
    run_stage(LinearpatchCompensate(tolerance=between, rescale=True), tmp_path / "c", model=pruned, calibration=calibration)
    with pytest.raises(StageError, match=r"over 'tolerance' .* set rescale: true, or raise it to take the nearest fold"):
        run_stage(LinearpatchCompensate(tolerance=between), tmp_path / "d", model=pruned, calibration=calibration)


def test_linearpatch_at_several_cuts_divides_each_layer_once(text: Path, tmp_path: Path) -> None:
    """The scale of an upper cut is over that of the lower: both are in what is written above both."""
    model, calibration = make_inputs(tmp_path, text)
    pruned = model.without_layers([1, 3])
    result = run_stage(LinearpatchCompensate(tolerance=1.0, rescale=True), tmp_path / "a", model=pruned, calibration=calibration)
    scales = result.compensation.scales
    assert list(scales) == [2, 4]
    for layer, scale in ((2, scales[2]), (4, scales[4]), (5, scales[4])):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        before, after = model.stored_tensor(name), result.model.patches[name].load()[name]
        assert torch.allclose(after * scale, load_tensor(before), rtol=1e-5)
    assert all(scale != other for scale, other in pairwise(scales.values()))


def test_what_cannot_be_rescaled_is_refused_at_check(tmp_path: Path) -> None:
    model = make_any_model(tmp_path / "model", "olmo2")
    recipe = tmp_path / "recipe.yaml"

    def check(*stages: dict[str, Any]) -> tuple[int, str]:
        calibrate = {"use": "calibrate", "with": {"dataset": {"builtin": "calibration"}, "samples": 8, "sequence_length": 16}}
        steps = [calibrate, {"use": "prune", "with": {"layers": [1]}}, *stages]
        recipe.write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": steps}))
        result = CliRunner().invoke(app, ["check", str(recipe)])
        return result.exit_code, result.output

    assert check({"use": "project_compensate"})[0] == 0
    code, said = check({"use": "project_compensate", "with": {"rescale": True}})
    assert code == 2
    assert "depends on the size of the residual stream" in said
    assert "set it to false" in said
    code, said = check({"use": "prunecomp_compensate"})
    assert code == 2
    assert "the stream cannot be rescaled" in said
