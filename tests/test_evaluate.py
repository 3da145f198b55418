"""Evaluation: perplexity against transformers, and limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.evaluate import Evaluate
from transformers import AutoModelForCausalLM

from gradmap_pipeline import Forecasts, ModelForecast, OptionError, QualityError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.data import load_tokenizer
from gradmap_pipeline.testing import run_stage


def make_stage(text: Path, **options: Any) -> Evaluate:
    return Evaluate.model_validate({"dataset": {"path": text}, "samples": 10, "sequence_length": 32, **options})


def test_perplexity_is_that_of_the_whole_model(llama: Path, text: Path, tmp_path: Path) -> None:
    """Every sequence begins with BOS, and every token after it is predicted once."""
    model = open_folder(llama)
    evaluation = run_stage(make_stage(text), tmp_path, model=model).evaluation
    ids = load_tokenizer(model.base)(text.read_text())["input_ids"]
    sequences = torch.tensor([ids[:32], *([1, *ids[n * 31 + 1 : n * 31 + 32]] for n in range(1, 10))])
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    with torch.no_grad():
        loss = float(whole(input_ids=sequences, labels=sequences).loss)
    assert evaluation.tokens == 10 * 31
    assert evaluation.loss == pytest.approx(loss, rel=1e-6)
    assert evaluation.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert (evaluation.layers, evaluation.label, evaluation.model) == (4, "dense", model.digest)
    assert (evaluation.parameters, evaluation.bytes) == (model.count_parameters(), model.size_bytes)


def test_all_samples(llama: Path, text: Path, tmp_path: Path) -> None:
    model = open_folder(llama)
    evaluation = run_stage(make_stage(text, samples="all"), tmp_path, model=model).evaluation
    tokens = len(load_tokenizer(model.base)(text.read_text())["input_ids"])
    assert evaluation.tokens == (tokens - 1) // 31 * 31  # the text's own BOS begins the first sequence


def test_limits(llama: Path, text: Path, tmp_path: Path) -> None:
    dense = open_folder(llama)
    pruned = dense.without_layers([1])
    perplexities = [run_stage(make_stage(text), tmp_path, model=model).evaluation.perplexity for model in (dense, pruned)]
    ratio = perplexities[1] / perplexities[0]
    passed = run_stage(make_stage(text, max_perplexity_ratio=ratio * 1.001), tmp_path, model=pruned).evaluation
    assert passed.base_perplexity == pytest.approx(perplexities[0], rel=1e-12)
    with pytest.raises(QualityError, match=r"times that of the unpruned model .* over max_perplexity_ratio") as caught:
        run_stage(make_stage(text, max_perplexity_ratio=ratio * 0.999), tmp_path, model=pruned)
    assert caught.value.exit_code == 5
    with pytest.raises(QualityError, match=r"is over max_perplexity 2; remove fewer layers"):
        run_stage(make_stage(text, max_perplexity=2), tmp_path, model=dense)


def test_a_model_that_computes_nan_passes_no_limit(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match="perplexity nan"):
        make_stage(text, max_perplexity=1000)._check_limits(math.nan, None)


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({"samples": 0}, "samples", "found 0; accepted: a whole number from 1, or all"),
        ({"sequence_length": 65}, "sequence_length", "found 65, but the model is made for 64 tokens; accepted: 2 to 64"),
    ],
)
def test_the_plan_refuses(text: Path, options: dict[str, Any], option: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        make_stage(text, **options).forecast(Forecasts(Evaluate, model=ModelForecast(layers=4, positions=64)))
    assert caught.value.option == option
