"""The stage computes what it says, and keeps the contract of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_name import StageName

from gradmap_pipeline import DatasetSource, QualityError
from gradmap_pipeline.testing import check_stage, make_inputs, run_stage

TEXT = DatasetSource(builtin="heldout")


def test_accuracy_is_that_of_plain_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from gradmap_pipeline.data import load_tokenizer, make_sequences

    model = make_inputs(StageName, tmp_path)["model"].dense
    measured = run_stage(StageName(dataset=TEXT, samples=4, sequence_length=64), tmp_path / "run", model=model).accuracy
    ids, _ = make_sequences(load_tokenizer(model.base), TEXT.documents(), 64, 4)
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float32)
    with torch.no_grad():
        right = int((whole(input_ids=ids).logits[:, :-1].argmax(dim=-1) == ids[:, 1:]).sum())
    assert measured.tokens == 4 * 63
    assert measured.accuracy == pytest.approx(right / (4 * 63))


def test_limit_stops_the_run(tmp_path: Path) -> None:
    stage = StageName(dataset=TEXT, samples=4, sequence_length=64, min_accuracy=1.0)
    with pytest.raises(QualityError, match="under min_accuracy 1"):
        run_stage(stage, tmp_path / "run", **make_inputs(StageName, tmp_path))


def test_stage_keeps_the_contract(tmp_path: Path) -> None:
    stage = StageName(dataset=TEXT, samples=4, sequence_length=64)
    assert check_stage(stage, **make_inputs(StageName, tmp_path)) == []
