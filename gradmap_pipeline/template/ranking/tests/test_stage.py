"""The stage computes what it says, and keeps the contract of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_name import StageName

from gradmap_pipeline import load_tensor
from gradmap_pipeline.testing import check_stage, make_inputs, run_stage


def test_scores_are_norms_and_the_smallest_goes_first(tmp_path: Path) -> None:
    inputs = make_inputs(StageName, tmp_path)
    scores = run_stage(StageName(layers=3, protect_first=0, protect_last=0), tmp_path / "run", **inputs).scores
    model = inputs["model"]
    norms = {
        layer: sum(float(load_tensor(tensor).double().norm()) ** 2 for tensor in model.layer_tensors(layer).values()) ** 0.5
        for layer in model.layers
    }
    assert scores.decisions[0].scores == pytest.approx(norms)
    assert scores.order == tuple(sorted(norms, key=norms.__getitem__)[:3])


def test_stage_keeps_the_contract(tmp_path: Path) -> None:
    assert check_stage(StageName(mean=True), **make_inputs(StageName, tmp_path)) == []
