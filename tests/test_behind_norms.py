"""Corrections of linear maps that write through a norm: what can be reached, and least squares towards it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gradmap_plugins.project_compensate import ProjectCompensate
from transformers import AutoModelForCausalLM
from walk import make_calibration, make_model as make_any_model

from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.correction.behind_norms import nearest_of_size
from gradmap_pipeline.testing import make_context, run_stage

LAYER, RIDGE, SHRINK = 1, 0.05, 0.4
PARTS = ("mlp.down_proj", "post_feedforward_layernorm")


def test_nearest_of_a_size_meets_the_conditions_of_optimality() -> None:
    """The problem is convex: v is the solution where the gradient there is -μ v, μ ≥ 0, and μ = 0 inside the ball."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.randn(16, generator=draw).double()
    scale[3] = 0
    wanted = torch.randn(200, 16, generator=draw).double()
    size = torch.rand(200, 1, generator=draw).double() * 20
    v = nearest_of_size(scale, wanted, size)
    length = v.norm(dim=-1, keepdim=True)
    assert bool((length <= size * (1 + 1e-9)).all())
    inside = (length < size * (1 - 1e-6))[:, 0]
    assert 10 < int(inside.sum()) < 190  # both are tried
    gradient = scale * (scale * v - wanted)
    assert gradient[inside].abs().max() < 1e-9
    outside, at = gradient[~inside], v[~inside]
    multiplier = -(outside * at).sum(-1, keepdim=True) / at.square().sum(-1, keepdim=True)
    assert bool((multiplier >= 0).all())
    assert (outside + multiplier * at).abs().max() < 1e-6


def run_whole(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """In fp64: what leaves each layer, and what parts of one take and give, all (tokens, channels)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    seen: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _m, _i, out, index=index: seen.update(
                {f"leaves {index}": (out[0] if isinstance(out, tuple) else out).flatten(0, 1)}
            )
        )
    for part in PARTS:
        model.model.layers[LAYER].get_submodule(part).register_forward_hook(
            lambda _m, taken, out, part=part: seen.update({f"in {part}": taken[0].flatten(0, 1), f"out {part}": out.flatten(0, 1)})
        )
    with torch.no_grad():
        model(input_ids=ids)
    return seen


@pytest.mark.parametrize(("architecture", "offset"), [("olmo2", 0.0), ("gemma2", 1.0)])
def test_map_is_corrected_for_what_a_turn_can_make_up_for(architecture: str, offset: float, tmp_path: Path) -> None:
    """Layer 1, right below a cut: ridge regression in fp64 of g ⊙ (u' - u) on a / r, and ΔW = (X / g)ᵀ."""
    graph = open_folder(make_any_model(tmp_path / "model", architecture))
    calibration = make_calibration(graph, tmp_path / "calibration")
    stage = ProjectCompensate(site="before_cuts", ridge=RIDGE, shrink=SHRINK)
    result = run_stage(stage, tmp_path / "out", model=graph.without_layers([2]), calibration=calibration)
    assert [(site.parameter, site.role) for site in result.compensation.sites] == [
        ("mlp.down_proj.weight", "output"),
        ("post_feedforward_layernorm.weight", "norm"),
    ]

    seen = run_whole(graph.base.folder, calibration.load()[0])
    taken, y = seen["in mlp.down_proj"], seen["out mlp.down_proj"]
    whole = AutoModelForCausalLM.from_pretrained(graph.base.folder, dtype=torch.float64)
    scale = whole.model.layers[LAYER].post_feedforward_layernorm.weight.detach() + offset
    written = seen["out post_feedforward_layernorm"]
    u = written / scale
    r = (y * u).sum(-1, keepdim=True) / (u * u).sum(-1, keepdim=True)
    assert torch.allclose(r * u, y, rtol=1e-4, atol=1e-9)  # a norm without a mean
    missing = seen["leaves 2"] - seen["leaves 1"]
    residual = scale * (nearest_of_size(scale, written + missing, u.norm(dim=-1, keepdim=True)) - u)
    a = taken / r
    penalty = RIDGE * a.square().sum(0).mean()
    rows = torch.cat([a, penalty.sqrt() * torch.eye(a.shape[1]).double()])
    x = torch.linalg.lstsq(rows, torch.cat([residual, torch.zeros(a.shape[1], residual.shape[1]).double()])).solution
    explained = 1 - float((residual - a @ x).square().sum() / residual.square().sum())
    expected = (x / scale).T * explained / (explained + SHRINK)
    (name,) = (name for name in result.model.patches if name.endswith(f"{LAYER}.mlp.down_proj.weight"))
    change = result.model.patches[name].load()[name].double() - whole.model.layers[LAYER].mlp.down_proj.weight.detach()
    assert (change - expected).norm() <= 2e-3 * expected.norm()


def test_what_leaves_the_layer_comes_nearer_to_the_original(tmp_path: Path) -> None:
    """The promise itself, in fp64: the distance at the cut falls with the map turned, and again with the norm's scale."""
    graph = open_folder(make_any_model(tmp_path / "model", "gemma2"))
    calibration = make_calibration(graph, tmp_path / "calibration")
    stage = ProjectCompensate(site="before_cuts", ridge=RIDGE, shrink=SHRINK)
    result = run_stage(stage, tmp_path / "out", model=graph.without_layers([2]), calibration=calibration)
    seen = run_whole(graph.base.folder, calibration.load()[0])
    before = float((seen["leaves 2"] - seen["leaves 1"]).square().sum())

    def distance(parts: tuple[str, ...]) -> float:
        model = AutoModelForCausalLM.from_pretrained(graph.base.folder, dtype=torch.float64).eval()
        for name, file in result.model.patches.items():
            if any(part in name for part in parts):
                model.get_parameter(name).data = file.load()[name].double()
        leaving: list[torch.Tensor] = []
        model.model.layers[LAYER].register_forward_hook(
            lambda _m, _i, out: leaving.append((out[0] if isinstance(out, tuple) else out).flatten(0, 1))
        )
        with torch.no_grad():
            model(input_ids=calibration.load()[0])
        return float((seen["leaves 2"] - leaving[0]).square().sum())

    assert distance(PARTS) < distance(PARTS[:1]) < 0.9 * before, (distance(PARTS), distance(PARTS[:1]), before)


def test_output_space_leaves_maps_behind_norms_as_they_are(tmp_path: Path) -> None:
    graph = open_folder(make_any_model(tmp_path / "model", "olmo2"))
    calibration = make_calibration(graph, tmp_path / "calibration")
    context = make_context(tmp_path / "out", notes=(notes := []))
    stage = ProjectCompensate(site="before_cuts", space="output")
    result = stage.run(stage.Inputs(model=graph.without_layers([2]), calibration=calibration), context)
    assert [site.parameter for site in result.compensation.sites] == ["post_feedforward_layernorm.weight"], notes
