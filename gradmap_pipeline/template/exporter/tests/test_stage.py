"""The stage writes what it says, and keeps the contract of stages."""

from __future__ import annotations

import json
from pathlib import Path

from stage_name import StageName

from gradmap_pipeline import load_tensor
from gradmap_pipeline.testing import check_stage, make_inputs, run_stage


def test_folder_holds_every_tensor_as_it_is(tmp_path: Path) -> None:
    import numpy as np

    inputs = make_inputs(StageName, tmp_path)
    exported = run_stage(StageName(to=tmp_path / "out"), tmp_path / "run", **inputs).exported
    tensors = inputs["model"].export_tensors()
    assert {file.stem for file in (tmp_path / "out").glob("*.npy")} == set(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(np.load(tmp_path / "out" / f"{name}.npy"), load_tensor(tensor).float().numpy())
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == len(inputs["model"].layers)
    assert set(exported.files) == {file.name for file in (tmp_path / "out").iterdir()}


def test_stage_keeps_the_contract(tmp_path: Path) -> None:
    stage = StageName(to=tmp_path / "out", dtype="float16")
    assert check_stage(stage, **make_inputs(StageName, tmp_path)) == []
