"""The stage computes what it says, and keeps the contract of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_name import StageName

from gradmap_pipeline import Forecasts, ModelForecast, OptionError
from gradmap_pipeline.testing import check_stage, make_inputs, run_stage


def test_layers_are_dropped(tmp_path: Path) -> None:
    inputs = make_inputs(StageName, tmp_path)
    before = inputs["model"].layers
    after = run_stage(StageName(layers=[before[1], before[3]]), tmp_path / "run", **inputs).model.layers
    assert after == (before[0], before[2], *before[4:])


def test_layer_that_is_not_there_is_told_before_the_run() -> None:
    inputs = Forecasts(StageName, model=ModelForecast(layers=3, kept=(0, 1, 2)))
    assert StageName(layers=[1]).forecast(inputs) == {"model": ModelForecast(layers=2, kept=(0, 2))}
    with pytest.raises(OptionError, match="there is no layer 5"):
        StageName(layers=[1, 5]).forecast(inputs)
    with pytest.raises(OptionError, match="leaves none"):
        StageName(layers=[0, 1, 2]).forecast(inputs)


def test_stage_keeps_the_contract(tmp_path: Path) -> None:
    assert check_stage(StageName(layers=[3]), **make_inputs(StageName, tmp_path)) == []
