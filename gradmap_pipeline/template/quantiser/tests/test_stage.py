"""The stage computes what it says, and keeps the contract of stages."""

from __future__ import annotations

from pathlib import Path

from stage_name import StageName, round_rows

from gradmap_pipeline.testing import check_stage, make_inputs, run_stage


def test_rows_are_rounded_to_the_nearest_of_255_values() -> None:
    import torch

    weight = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    rounded = round_rows(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert all(len(row.unique()) <= 255 for row in rounded)
    assert bool(((rounded - weight).abs() <= step / 2 * 1.0001).all())
    assert torch.equal(round_rows(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_folder_holds_rounded_matrices(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    inputs = make_inputs(StageName, tmp_path)
    exported = run_stage(StageName(to=tmp_path / "out"), tmp_path / "run", **inputs).model
    assert exported.max_logit_difference > 0
    layers = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers
    assert len(layers) == len(inputs["model"].layers)
    assert all(len(row.unique()) <= 255 for layer in layers for row in layer.mlp.down_proj.weight)


def test_stage_keeps_the_contract(tmp_path: Path) -> None:
    assert check_stage(StageName(to=tmp_path / "out", head=True), **make_inputs(StageName, tmp_path)) == []
