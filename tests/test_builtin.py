"""The built-in model is worth pruning: the method's promises hold on it, on text it never saw."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gradmap_pipeline.builtin.text import Split, load_documents
from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
from gradmap_pipeline.cli import app

ROOT = Path(__file__).parent.parent


def test_it_is_small_and_ordinary() -> None:
    assert sum(file.stat().st_size for file in BUILTIN_FOLDER.iterdir()) <= 6_000_000
    model, report = AutoModelForCausalLM.from_pretrained(BUILTIN_FOLDER, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (model.config.model_type, model.config.num_hidden_layers, model.dtype) == ("llama", 12, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_FOLDER)
    text = "def read(self, size=-1):\n    return self.buffer\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_no_document_is_empty(split: Split) -> None:
    documents = load_documents(split)
    assert len(documents) > 50
    assert all(text.strip() for text in documents)


@pytest.mark.full
def test_quickstart_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning costs, compensation wins some of it back, and depth was worth something."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", str(ROOT / "recipes" / "quickstart.yaml"), "--json"])
    assert result.exit_code == 0, result.stdout
    finished = {event["step"]: event for event in map(json.loads, result.stdout.splitlines()) if event["event"] == "step_finished"}
    dense, pruned, compensated = (
        finished[step]["outputs"]["evaluation"]["perplexity"] for step in ("evaluate_dense", "evaluate_pruned", "evaluate")
    )
    assert dense < 40
    assert dense * 1.1 < pruned < dense * 2
    closed = math.log(pruned / compensated) / math.log(pruned / dense)
    print(f"dense {dense:.3f} pruned {pruned:.3f} compensated {compensated:.3f} gap closed {closed:.1%}")
    assert closed > 0.1
    loaded = AutoModelForCausalLM.from_pretrained("out/quickstart", dtype="auto")
    assert loaded.config.num_hidden_layers == 9
    assert (
        sum(parameter.numel() for parameter in loaded.parameters()) == finished["evaluate"]["outputs"]["evaluation"]["parameters"]
    )
    assert loaded.generate(torch.tensor([[0, 70, 71]]), max_new_tokens=8, do_sample=False).shape == (1, 11)
