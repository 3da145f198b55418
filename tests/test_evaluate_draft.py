"""Acceptance of drafted tokens, against plain transformers in fp64 and against generation with an assistant."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.evaluate_draft import EvaluateDraft, acceptance, count_run, expected_tokens
from gradmap_plugins.export import ExportModel
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradmap_pipeline import DatasetSource, ModelGraph
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
from gradmap_pipeline.data.sequences import make_sequences
from gradmap_pipeline.data.tokenizer import load_tokenizer
from gradmap_pipeline.testing import run_stage

DRAFTED = 3


def test_tokens_of_a_pass_are_those_of_all_outcomes() -> None:
    """Each outcome of n acceptances, with its probability, gives those before the first refusal, and one more."""
    for share in (0.0, 0.3, 1.0):
        total = 0.0
        for outcome in product((True, False), repeat=DRAFTED):
            probability = float(torch.tensor([share if is_taken else 1 - share for is_taken in outcome]).prod())
            total += probability * (1 + (outcome.index(False) if False in outcome else DRAFTED))
        assert expected_tokens(share, DRAFTED) == pytest.approx(total, rel=1e-6)


def test_acceptance_is_one_less_the_total_variation() -> None:
    large, draft = (
        torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1)
    )
    expected = 1 - 0.5 * (large.exp() - draft.exp()).abs().sum(-1)
    assert torch.allclose(acceptance(large, draft).double(), expected, atol=1e-6)


def test_a_run_ends_at_the_first_that_differs() -> None:
    agrees = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    assert count_run(agrees, 3).tolist() == [2, 1, 0, 3, 3]


@pytest.fixture
def pruned(tmp_path: Path) -> ModelGraph:
    return open_folder(make_model(tmp_path / "model", num_hidden_layers=6)).without_layers([2, 4])


def test_figures_are_those_of_whole_models(pruned: ModelGraph, text: Path, tmp_path: Path) -> None:
    source = DatasetSource.model_validate({"path": str(text)})
    options = {"dataset": {"path": str(text)}, "samples": 6, "sequence_length": 24, "draft_tokens": DRAFTED}
    metrics = run_stage(EvaluateDraft.model_validate(options), tmp_path / "stage", model=pruned).measurement.metrics
    measured = {metric.name: metric.value for metric in metrics}
    ids, _ = make_sequences(load_tokenizer(pruned.base), source.documents(), 24, 6, "documents", embeddings=300)
    whole = AutoModelForCausalLM.from_pretrained(pruned.base.folder, dtype=torch.float64).eval()
    with torch.no_grad():
        large = whole(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        whole.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(whole.model.layers) if index not in (2, 4))
        draft = whole(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    agrees = large.argmax(-1) == draft.argmax(-1)
    share = float((1 - 0.5 * (large.exp() - draft.exp()).abs().sum(-1)).mean())
    runs = [
        next((step for step in range(DRAFTED) if not row[start + step]), DRAFTED)
        for row in agrees
        for start in range(len(row) - DRAFTED + 1)
    ]
    assert measured["greedy agreement"] == pytest.approx(float(agrees.double().mean()))
    assert measured["sampled acceptance"] == pytest.approx(share, abs=2e-4)
    assert measured["KL divergence"] == pytest.approx(float((large.exp() * (large - draft)).sum(-1).mean()), abs=2e-3)
    assert measured["greedy tokens a pass"] == pytest.approx(1 + sum(runs) / len(runs))
    assert measured["sampled tokens a pass"] == pytest.approx((1 - share ** (DRAFTED + 1)) / (1 - share), rel=1e-3)
    assert not list(tmp_path.glob("stage/**/*.safetensors"))


def test_a_model_accepts_all_that_it_drafts_for_itself(pruned: ModelGraph, text: Path, tmp_path: Path) -> None:
    options = {"dataset": {"path": str(text)}, "samples": 2, "sequence_length": 24, "draft_tokens": DRAFTED}
    metrics = run_stage(EvaluateDraft.model_validate(options), tmp_path / "stage", model=pruned.dense).measurement.metrics
    assert [metric.value for metric in metrics] == pytest.approx([DRAFTED + 1, DRAFTED + 1, 1, 1, 0], abs=5e-3)


@pytest.mark.full
def test_an_export_assists_the_model_that_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is that of the model alone, and passes of the large model are saved as the measurement says."""
    monkeypatch.chdir(tmp_path)
    model = open_folder(BUILTIN_FOLDER).without_layers([7])
    run_stage(ExportModel.model_validate({"to": "out"}), tmp_path / "export", model=model)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_FOLDER)
    large, draft = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (BUILTIN_FOLDER, "out"))
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    large.register_forward_hook(count)
    prompt = tokenizer("def read_file(path):\n    with open(path) as", return_tensors="pt", return_token_type_ids=False)
    wanted = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
    alone = large.generate(**prompt, **wanted)
    passes = 0
    assisted = large.generate(**prompt, **wanted, assistant_model=draft)
    assert torch.equal(alone, assisted)
    assert passes < 40  # of 48 without an assistant
