"""The stage computes what it says, and keeps the contract of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_name import StageName

from gradmap_pipeline import load_tensor
from gradmap_pipeline.testing import check_stage, make_inputs, run_stage


def test_output_maps_before_the_cuts_are_scaled(tmp_path: Path) -> None:
    inputs = make_inputs(StageName, tmp_path)
    outputs = run_stage(StageName(), tmp_path / "run", **inputs)
    before, after = inputs["model"], outputs.model
    cuts = [layer for layer in before.layers if layer + 1 in before.removed]
    assert [site.layer for site in outputs.compensation.sites] == cuts
    assert all(0 <= site.missing_left < 1 for site in outputs.compensation.sites)
    assert len(after.patches) == len(cuts)
    for name in after.patches:
        old, new = (load_tensor(model.stored_tensor(name)).double() for model in (before, after))
        factor = float((old * new).sum() / old.square().sum())
        assert factor != pytest.approx(1)
        assert float((new - factor * old).norm() / new.norm()) < 0.01  # what rounding to the type of the checkpoint leaves


def test_stage_keeps_the_contract(tmp_path: Path) -> None:
    assert check_stage(StageName(strength=0.5), **make_inputs(StageName, tmp_path)) == []
