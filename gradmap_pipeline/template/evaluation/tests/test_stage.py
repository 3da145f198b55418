"""The stage computes what it says, and keeps the contract of stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from stage_name import StageName

from gradmap_pipeline import DatasetSource, load_tokenizer, make_sequences
from gradmap_pipeline.testing import check_stage, make_inputs, run_stage

TEXT = DatasetSource(builtin="heldout")


def test_accuracy_is_that_of_plain_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = make_inputs(StageName, tmp_path)["model"].dense
    outputs = run_stage(StageName(dataset=TEXT, samples=4, sequence_length=64), tmp_path / "run", model=model)
    (metric,) = outputs.measurement.metrics
    ids, _ = make_sequences(load_tokenizer(model.base), TEXT.documents(), 64, 4)
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float32)
    with torch.no_grad():
        right = int((whole(input_ids=ids).logits[:, :-1].argmax(dim=-1) == ids[:, 1:]).sum())
    share = right / (4 * 63)
    assert metric.value == pytest.approx(share)
    assert metric.stderr == pytest.approx((share * (1 - share) / (4 * 63)) ** 0.5)
    assert (metric.title, metric.better) == ("accuracy on builtin heldout", "higher")


def test_limit_stops_the_run(tmp_path: Path) -> None:
    recipe = Path(__file__).parent.parent / "recipe.yaml"
    command = [sys.executable, "-m", "gradmap_pipeline", "run", str(recipe), "--set", "measure_dense.limits.accuracy.min=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "on 'builtin heldout' is under min 1 by 0." in done.stderr


def test_stage_keeps_the_contract(tmp_path: Path) -> None:
    stage = StageName(dataset=TEXT, samples=4, sequence_length=64)
    assert check_stage(stage, **make_inputs(StageName, tmp_path)) == []
