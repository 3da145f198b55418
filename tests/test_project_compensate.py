"""Compensation against independent fp64 least squares, and its effect where the answer is known."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.export import ExportModel
from gradmap_plugins.project_compensate import ProjectCompensate
from pydantic import ValidationError
from tiny import make_model
from transformers import AutoModelForCausalLM
from walk import make_calibration, make_model as make_any_model

from gradmap_pipeline import CalibrationSet, CapacityError, ModelError, ModelGraph, StageError
from gradmap_pipeline.batches import make_batches
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.correction import ridge
from gradmap_pipeline.correction.ridge import check_room, solve_ridge
from gradmap_pipeline.correction.site_search import check_gain, find_sites
from gradmap_pipeline.correction.sites import NoSiteError, Site
from gradmap_pipeline.machine.memory import resident_bytes
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.sample_pass import SamplePass
from gradmap_pipeline.testing import make_context, run_stage

DOWN = {"llama": "mlp.down_proj", "qwen3": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2"}
LAYERS = {"llama": "model.layers", "qwen3": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}


def make_inputs(folder: Path, architecture: str, text: Path, packing: str = "documents") -> tuple[ModelGraph, CalibrationSet]:
    model = open_folder(make_model(folder / "model", architecture))
    options = {"dataset": {"path": text}, "samples": 12, "sequence_length": 48}
    if packing == "none":
        lines = folder / "lines.csv"
        lines.write_text("text\n" + "\n".join(text.read_text()[i * 60 : i * 60 + 20 + 2 * i] for i in range(12)))
        options = {"dataset": {"path": lines}, "samples": 12, "sequence_length": 48, "packing": "none"}
    return model, run_stage(Calibrate.model_validate(options), folder / "calibration", model=model).calibration


def test_solve_ridge_is_augmented_least_squares() -> None:
    """min ‖AX - R‖² + λ‖X‖² is least squares on A with √λ·I below it."""
    generator = torch.Generator().manual_seed(0)
    a, r = torch.randn(50, 8, generator=generator).double(), torch.randn(50, 3, generator=generator).double()
    penalty = 0.1 * (a.T @ a).diagonal().mean()
    augmented = torch.cat([a, penalty.sqrt() * torch.eye(8).double()])
    expected = torch.linalg.lstsq(augmented, torch.cat([r, torch.zeros(8, 3).double()])).solution
    solution, value = solve_ridge(a.T @ a, a.T @ r, 0.1)
    objective = (a @ expected - r).square().sum() + penalty * expected.square().sum()
    assert value == pytest.approx(float(objective - r.square().sum()))
    torch.testing.assert_close(solution, expected, rtol=1e-10, atol=1e-12)


def test_room_for_the_sums_is_checked(tmp_path: Path) -> None:
    context = make_context(tmp_path, memory=resident_bytes() + (1 << 30))
    check_room(1000, 1000, context.memory, context.device)
    with pytest.raises(
        CapacityError, match=r"correcting 20000 inputs takes 3.81 GiB, .* are left; allow [0-9.]+GiB or more with --memory"
    ):
        check_room(20_000, 4000, context.memory, context.device)


def test_singular_gram_is_refused() -> None:
    with pytest.raises(StageError, match=r"singular Gram matrix\); raise 'ridge'"):
        solve_ridge(torch.zeros(3, 3).double(), torch.zeros(3, 2).double(), 0.1)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("space", ["input", "output"])
@pytest.mark.parametrize("packing", ["documents", "none"])
def test_patch_is_the_ridge_optimum(architecture: str, space: str, packing: str, text: Path, tmp_path: Path) -> None:
    """One site, from two whole models in fp64, by an independent solver, with padding left out."""
    model, calibration = make_inputs(tmp_path, architecture, text, packing)
    pruned = model.without_layers([2])
    stage = ProjectCompensate.model_validate(
        {"site": "before_cuts", "attention": False, "space": space, "ridge": 0.05, "shrink": 0.0}
    )
    result = run_stage(stage, tmp_path / "out", model=pruned, calibration=calibration)
    (site,) = result.compensation.sites
    assert (site.layer, site.parameter) == (1, f"{DOWN[architecture]}.weight")

    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64).eval()
    layers = whole.get_submodule(LAYERS[architecture])
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, pick: Any) -> Any:
        return lambda _module, inputs, output: seen.update({name: pick(inputs, output)})

    down = layers[1].get_submodule(DOWN[architecture])
    down.register_forward_hook(keep("a", lambda inputs, _: inputs[0]))
    down.register_forward_hook(keep("y", lambda _, output: output))
    layers[1].register_forward_hook(keep("h", lambda _, output: output[0] if isinstance(output, tuple) else output))
    layers[2].register_forward_hook(keep("target", lambda _, output: output[0] if isinstance(output, tuple) else output))
    ids, mask = calibration.load()
    assert bool((mask == 0).any()) == (packing == "none")
    with torch.no_grad():
        whole(input_ids=ids, attention_mask=mask)
    real = mask.bool()
    a = seen["a" if space == "input" else "y"].reshape(*ids.shape, -1)[real]  # OPT flattens samples and tokens
    missing = (seen["target"] - seen["h"])[real]
    penalty = (0.05 * a.square().sum() / a.shape[1]).sqrt()
    augmented = torch.cat([a, penalty * torch.eye(a.shape[1]).double()])
    zeros = torch.zeros(a.shape[1], missing.shape[1]).double()
    x = torch.linalg.lstsq(augmented, torch.cat([missing, zeros])).solution
    weight = down.weight.detach().T if architecture == "gpt2" else down.weight.detach()
    expected = weight + x.T if space == "input" else weight + x.T @ weight
    name = next(name for name in result.model.patches if name.endswith(f"{DOWN[architecture]}.weight"))
    patched = result.model.patches[name].load()[name].double()
    patched = patched.T if architecture == "gpt2" else patched
    assert (patched - expected).norm() <= 1e-5 * (expected - weight).norm()
    left = (missing - a @ x).square().sum() / missing.square().sum()
    assert site.missing_left == pytest.approx(float(left), rel=1e-4)
    shift = (seen["h"] - seen["target"])[real].mean(0).norm()
    assert site.shift == pytest.approx(float(shift), rel=1e-4)
    if down.bias is not None and space == "output":
        bias = name.replace("weight", "bias")
        moved = down.bias.detach() + x.T @ down.bias.detach()
        torch.testing.assert_close(result.model.patches[bias].load()[bias].double(), moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("space", ["input", "output"])
def test_correction_brings_the_stream_closer(space: str, text: Path, tmp_path: Path) -> None:
    """And changes no count of parameters, in every place it can be put."""
    model, calibration = make_inputs(tmp_path, "llama", text)
    pruned = model.without_layers([1])
    batches = make_batches(*calibration.load())
    target = SamplePass(LayerwiseModel(model), batches)
    target.run_forward()

    def distance(graph: ModelGraph) -> float:
        sweep = SamplePass(LayerwiseModel(graph), batches)
        sweep.run_forward()
        return float((sweep.boundary(len(graph.layers), 0) - target.boundary(4, 0)).square().sum())

    for site in ("largest_shift", "largest_relative_shift", "before_cuts", "every_layer"):
        stage = ProjectCompensate.model_validate({"site": site, "space": space, "ridge": 0.01, "shrink": 0.0})
        result = run_stage(stage, tmp_path / site, model=pruned, calibration=calibration)
        assert distance(result.model) < distance(pruned), site
        assert result.model.count_parameters() == pruned.count_parameters()
        assert result.model.label == "compensated"


def test_sites_follow_the_options(text: Path, tmp_path: Path) -> None:
    model, calibration = make_inputs(tmp_path, "llama", text)
    pruned = model.without_layers([1])

    def sites(**options: Any) -> list[int]:
        stage = ProjectCompensate.model_validate(options)
        compensation = run_stage(stage, tmp_path / "out", model=pruned, calibration=calibration).compensation
        assert compensation.shifts.keys() == ({0, 2, 3} if options["site"].startswith("largest") else set())
        if options["site"] == "largest_shift":
            assert compensation.sites[0].layer == max(compensation.shifts, key=compensation.shifts.__getitem__)
        return [site.layer for site in compensation.sites if site.role == "output"]

    assert sites(site="every_layer") == [0, 2, 3]
    assert sites(site="before_cuts") == [0]
    assert len(sites(site="largest_shift")) == 1
    assert len(set(sites(site="largest_relative_shift", sites=2))) == 2
    with pytest.raises(StageError, match="'sites' is 4, but the model has only 3 layers that drift"):
        sites(site="largest_shift", sites=4)


def test_nothing_removed_is_refused(text: Path, tmp_path: Path) -> None:
    model, calibration = make_inputs(tmp_path, "llama", text)
    with pytest.raises(StageError, match="the model has all its layers, so there is nothing to correct"):
        run_stage(ProjectCompensate(), tmp_path / "out", model=model, calibration=calibration)


def test_before_cuts_needs_a_layer_below(text: Path, tmp_path: Path) -> None:
    model, calibration = make_inputs(tmp_path, "llama", text)
    with pytest.raises(StageError, match="this correction needs a kept layer below a removed one, and there is none"):
        run_stage(ProjectCompensate(site="before_cuts"), tmp_path, model=model.without_layers([0]), calibration=calibration)


def test_sites_only_with_largest() -> None:
    with pytest.raises(ValidationError, match="'sites' counts the layers of largest shift; site 'every_layer' names"):
        ProjectCompensate(sites=2)


def find_first_sites(folder: Path, architecture: str, **changes: Any) -> tuple[Site, ...]:
    """Of layer 1 of a tiny model."""
    model = LayerwiseModel(open_folder(make_any_model(folder, architecture, **changes)))
    sweep = SamplePass(model, make_batches(torch.randint(3, 300, (2, 8)), torch.ones(2, 8)))
    sweep.run_forward()
    with model.layer(1):
        return find_sites(model, 1, sweep.boundary(1, 0), sweep.arguments(0, 1))


@pytest.mark.parametrize(
    ("architecture", "changes", "sites"),
    [
        ("llama", {}, [Site("self_attn.o_proj", "attention", 32), Site("mlp.down_proj", "output", 64)]),
        ("gptj", {}, [Site("mlp.fc_out", "output", 128)]),  # beside the attention, which writes to the output too
        (
            "granite",
            {"residual_multiplier": 0.25},
            [Site("self_attn.o_proj", "attention", 32, gain=0.25), Site("mlp.down_proj", "output", 64, gain=0.25)],
        ),
        (
            "deepseek_v3",
            {"first_k_dense_replace": 0},
            [Site("self_attn.o_proj", "attention", 32), Site("mlp.shared_experts.down_proj", "output", 32)],
        ),
        (
            "olmo2",
            {},
            [
                Site("self_attn.o_proj", "attention", 32, norm="post_attention_layernorm"),
                Site("mlp.down_proj", "output", 64, norm="post_feedforward_layernorm"),
                Site("post_feedforward_layernorm", "norm", 32),
            ],
        ),
        (
            "gemma2",
            {},
            [
                Site("self_attn.o_proj", "attention", 32, norm="post_attention_layernorm", norm_offset=1.0),
                Site("mlp.down_proj", "output", 64, norm="post_feedforward_layernorm", norm_offset=1.0),
                Site("post_feedforward_layernorm", "norm", 32),
            ],
        ),
        ("bert", {}, [Site("attention.output.dense", "attention", 32), Site("output.LayerNorm", "norm", 32)]),
        ("mixtral", {}, [Site("self_attn.o_proj", "attention", 32)]),
        ("mamba", {}, [Site("mixer.out_proj", "output", 64)]),
    ],
)
def test_sites_are_found_by_structure(architecture: str, changes: dict[str, Any], sites: list[Site], tmp_path: Path) -> None:
    names = find_first_sites(tmp_path / "model", architecture, **changes)
    assert [site.gain for site in names] == pytest.approx([site.gain for site in sites], rel=1e-6)
    assert [replace(site, gain=1.0) for site in names] == [replace(site, gain=1.0) for site in sites]


@pytest.mark.parametrize(
    ("architecture", "name", "role"),
    [
        ("llama", "mlp.down_proj", "output"),
        ("mixtral", "self_attn.o_proj", "attention"),
        ("bert", "output.LayerNorm", "norm"),
        ("phi", "mlp.fc2", "output"),
    ],
)
def test_sites_are_found_in_float32_whatever_is_computed_in(architecture: str, name: str, role: str, tmp_path: Path) -> None:
    """In bfloat16, what experts make of a vector is lost in rounding, and attention would seem to write to the output."""
    graph = open_folder(make_any_model(tmp_path / "model", architecture))
    calibration = make_calibration(graph, tmp_path / "calibration")
    stage = ProjectCompensate(attention=False)
    context = make_context(tmp_path / "out", dtype="bfloat16")
    result = stage.run(stage.Inputs(model=graph.without_layers([2]), calibration=calibration), context)
    assert {(site.parameter, site.role) for site in result.compensation.sites} == {(f"{name}.weight", role)}


def test_gain_that_is_a_weight_is_noticed(tmp_path: Path) -> None:
    model = LayerwiseModel(open_folder(make_any_model(tmp_path / "model", "granite", residual_multiplier=0.25)))
    sweep = SamplePass(model, make_batches(torch.randint(3, 300, (2, 8)), torch.ones(2, 8)))
    sweep.run_forward()
    with model.layer(1):
        call = (model, 1, sweep.boundary(1, 0), sweep.arguments(0, 1))
        check_gain(*call, Site("mlp.down_proj", "output", 64, gain=0.25))
        with pytest.raises(NoSiteError, match=r"layer 1 scales what mlp\.down_proj adds by a weight"):
            check_gain(*call, Site("mlp.down_proj", "output", 64, gain=0.3))


def test_no_site_where_nothing_writes_unchanged(tmp_path: Path) -> None:
    """MiniMax adds its experts to what a norm makes of the stream, so that attention does not reach the stream either."""
    with pytest.raises(NoSiteError, match=r"layer 1 of MiniMaxForCausalLM has no linear map and no norm that writes"):
        find_first_sites(tmp_path / "model", "minimax")


def run_whole(folder: Path, layers: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """In fp64: what enters and leaves each layer (`in 2`, `out 2`), and parts of layer 1 or 3 by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            seen[f"in {name}"] = inputs[0] if inputs else named["hidden_states"]
            seen[f"out {name}"] = output[0] if isinstance(output, tuple) else output

        return hook

    for index, layer in enumerate(model.get_submodule(layers)):
        layer.register_forward_hook(keep(str(index)), with_kwargs=True)
        for name in ("post_feedforward_layernorm", "output.LayerNorm", "self_attn.o_proj"):
            for part, module in layer.named_modules():
                if part == name:
                    module.register_forward_hook(keep(f"{index} {name}"), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids)
    return seen


@pytest.mark.parametrize(
    ("architecture", "layers", "norm", "bias"),
    [("flex_olmo", "model.layers", "post_feedforward_layernorm", False), ("bert", "bert.encoder.layer", "output.LayerNorm", True)],
)
def test_norm_is_corrected_channel_by_channel(
    architecture: str, layers: str, norm: str, bias: bool, text: Path, tmp_path: Path
) -> None:
    """The scale, and the shift where there is one, are the ridge optimum of each channel alone."""
    model = open_folder(make_any_model(tmp_path / "model", architecture))
    calibration = make_calibration(model, tmp_path / "calibration")
    pruned = model.without_layers([2])
    stage = ProjectCompensate(site="before_cuts", ridge=0.05, shrink=0.4)
    result = run_stage(stage, tmp_path / "out", model=pruned, calibration=calibration)
    (site,) = result.compensation.sites
    assert (site.layer, site.parameter, site.role) == (1, f"{norm}.weight", "norm")

    seen = run_whole(model.base.folder, layers, calibration.load()[0])
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64)
    module = whole.get_submodule(f"{layers}.1.{norm}")
    shift = module.bias.detach() if bias else 0
    a = ((seen[f"out 1 {norm}"] - shift) / module.weight.detach()).flatten(0, 1)
    missing = (seen["out 2"] - seen["out 1"]).flatten(0, 1)
    penalty = 0.05 * a.square().sum(0).mean()
    parts = ("weight", "bias")[: 1 + bias]
    solutions, left = torch.zeros(len(parts), 32).double(), 0.0
    for channel in range(32):
        columns = [a[:, channel]] + ([torch.ones(len(a)).double()] if bias else [])
        rows = torch.stack(columns, dim=1)
        augmented = torch.cat([rows, torch.tensor([[float(penalty.sqrt())] + [0.0] * bias]).double()])
        target = torch.cat([missing[:, channel], torch.zeros(1).double()]).unsqueeze(1)
        solutions[:, channel] = torch.linalg.lstsq(augmented, target).solution[:, 0]
        left += float((missing[:, channel] - rows @ solutions[:, channel]).square().sum())
    explained = 1 - left / float(missing.square().sum())
    for position, part in enumerate(parts):
        name = next(name for name in result.model.patches if name.endswith(f"{norm}.{part}"))
        change = result.model.patches[name].load()[name].double() - getattr(module, part).detach()
        expected = solutions[position] * explained / (explained + 0.4)  # what explains little is held back
        assert (change - expected).norm() <= 1e-3 * expected.norm()


def test_attention_makes_up_for_what_was_missing_before(tmp_path: Path) -> None:
    """Experts end the layer, so the layer above the cut is corrected where its attention writes to the stream."""
    model = open_folder(make_any_model(tmp_path / "model", "mixtral"))
    calibration = make_calibration(model, tmp_path / "calibration")
    pruned = model.without_layers([2])
    notes: list[str] = []
    stage = ProjectCompensate(ridge=0.05, shrink=0.0)
    context = make_context(tmp_path / "out", notes=notes)
    result = stage.run(stage.Inputs(model=pruned, calibration=calibration), context)
    assert [site.layer for site in result.compensation.sites] == [3, 4, 5]
    assert notes[0] == "left as it is: layer 1 can be corrected only for what was missing before it, and nothing was"
    assert notes[1].endswith("of the missing residual restored in self_attn.o_proj.weight")

    ids = calibration.load()[0]
    whole = run_whole(model.base.folder, "model.layers", ids)
    exported = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64).eval()
    del exported.model.layers[2]
    exported.save_pretrained(tmp_path / "without")
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    (tmp_path / "without" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    seen = run_whole(tmp_path / "without", "model.layers", ids)
    a = seen["in 2 self_attn.o_proj"].flatten(0, 1)
    missing = (whole["in 3"] - seen["in 2"]).flatten(0, 1)
    penalty = (0.05 * a.square().sum() / a.shape[1]).sqrt()
    augmented = torch.cat([a, penalty * torch.eye(a.shape[1]).double()])
    x = torch.linalg.lstsq(augmented, torch.cat([missing, torch.zeros(a.shape[1], 32).double()])).solution
    name = "model.layers.3.self_attn.o_proj.weight"
    weight = exported.model.layers[2].self_attn.o_proj.weight.detach()
    patched = result.model.patches[name].load()[name].double()
    assert (patched - weight - x.T).norm() <= 1e-4 * x.norm()


@pytest.mark.parametrize("space", ["input", "output"])
def test_gain_is_part_of_the_correction(space: str, tmp_path: Path) -> None:
    """Granite scales what each part adds: the optimum is the same as without, at another scale."""
    model = open_folder(make_any_model(tmp_path / "model", "granite", residual_multiplier=0.25))
    calibration = make_calibration(model, tmp_path / "calibration")
    stage = ProjectCompensate.model_validate({"site": "before_cuts", "ridge": 0.05, "space": space, "shrink": 0.0})
    result = run_stage(stage, tmp_path / "out", model=model.without_layers([2]), calibration=calibration)
    ids = calibration.load()[0]
    seen = run_whole(model.base.folder, "model.layers", ids)
    missing = (seen["out 2"] - seen["out 1"]).square().sum()
    folder = tmp_path / "exported"
    run_stage(ExportModel(to=folder), tmp_path / "export", model=result.model)
    left = (seen["out 2"] - run_whole(folder, "model.layers", ids)["out 1"]).square().sum()
    assert float(left / missing) == pytest.approx(result.compensation.sites[0].missing_left, rel=1e-3)


def test_patched_tensors_go_by_their_names_on_disk(tmp_path: Path) -> None:
    """HunYuan 3 stores the down-projection of its shared expert under another name than the module's."""
    model = open_folder(make_any_model(tmp_path / "model", "hy_v3"))
    name = LayerwiseModel(model).disk_name(4, "mlp.shared_experts.down_proj.weight")
    assert name in model.base.tensors
    assert name != "model.layers.4.mlp.shared_experts.down_proj.weight"
    with pytest.raises(ModelError, match=r"'mlp.experts.down_proj', which the checkpoint stores in several parts"):
        LayerwiseModel(model).disk_name(4, "mlp.experts.down_proj")


@pytest.mark.parametrize(("architecture", "inputs"), [("llama", 64), ("phi3", 64), ("gpt2", 128)])
def test_a_correction_has_the_size_of_the_down_projection(architecture: str, inputs: int, tmp_path: Path) -> None:
    """Not of a wider matrix: phi3's gate and up projections are one, of 128 rows; llama's keys are narrower than hidden states."""
    graph = open_folder(make_model(tmp_path / "model", architecture))
    assert ProjectCompensate()._size(graph) == (inputs, 32)
    assert ProjectCompensate(space="output")._size(graph) == (32, 32)


@pytest.mark.parametrize("block", [16, 256])
def test_one_triangle_of_the_sums_is_enough(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of 40 inputs in one block, and in blocks of which the last is smaller, against normal equations in fp64."""
    monkeypatch.setattr(ridge, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    a, r = torch.randn(100, 40, generator=generator).double(), torch.randn(100, 40, generator=generator).double()
    eye = torch.eye(40).double()
    gram = a.T @ a
    penalised = gram + 0.1 * gram.diagonal().mean() * eye
    for towards, expected in (
        ("solve", torch.linalg.solve(penalised, a.T @ r)),
        ("solve_factor", torch.linalg.solve(penalised, a.T @ (r + a)) - eye),
    ):
        moments = ridge.Moments(torch.zeros(40, 40).double(), torch.zeros(40, 40).double(), 0.0)
        moments.add(a[:60], r[:60])
        moments.add(a[60:], r[60:])
        x, _ = getattr(moments, towards)(0.1)
        assert torch.allclose(x, expected, atol=1e-12), towards


def test_sums_of_single_precision_give_the_solution_of_double_precision() -> None:
    """Inputs ten thousand times as large as others, and tokens a thousand times as large as the rest, as real models have."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -4, 48) * torch.linalg.qr(torch.randn(48, 48, generator=generator))[0]
    a = torch.randn(3000, 48, generator=generator) @ spread
    a[::400] *= 1000
    r = (a @ torch.randn(48, 16, generator=generator) * 0.1 + 0.01 * torch.randn(3000, 16, generator=generator)).double()
    wide = a.double()
    gram = wide.T @ wide
    expected = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(48).double(), wide.T @ r)
    moments = ridge.Moments(torch.zeros(48, 48).double(), torch.zeros(48, 16).double(), 0.0)
    for some_a, some_r in zip(a.split(1100), r.split(1100), strict=True):
        moments.add(some_a, some_r)
    x, _ = moments.solve(0.1)
    assert (x - expected).norm() < 1e-6 * expected.norm()
    assert (wide @ (x - expected))[1::400].norm() < 1e-6 * (wide @ expected)[1::400].norm()  # for other tokens than the large ones
    assert moments.missing == pytest.approx(float(r.square().sum()))


FAULTS = """
import resource, torch
from gradmap_pipeline.correction.ridge import Moments
from gradmap_pipeline.machine.memory import tune_allocator

tune_allocator(is_tight=True)
torch.set_num_threads(1)
a, r = torch.randn(1024, 1536), torch.randn(1024, 512).double()
moments = Moments(torch.zeros(1536, 1536).double(), torch.zeros(1536, 512).double(), 0.0)
moments.add(a, r)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
moments.add(a, r)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_sums_take_no_memory_from_the_system_for_each_product() -> None:
    """Which costs more than the product where memory is limited, as freed blocks then go back at once."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    pages = int(done.stdout)
    assert pages < 5 * 1024 * (1536 * 4 + 512 * 8) // 4096, pages  # some copies of what is added; 48 products have four times that
