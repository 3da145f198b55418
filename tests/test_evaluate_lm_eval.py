"""lm-eval tasks of a local folder: scores against plain transformers, limits, and what is said of wrong names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.evaluate_lm_eval import EvaluateLmEval, make_score
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from gradmap_pipeline import CapacityError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.tasks import harness
from gradmap_pipeline.testing import make_context, run_stage

pytestmark = pytest.mark.full

pytest.importorskip("lm_eval")

ROWS = [
    {"question": f"{word} is", "choices": [f" {a}", f" {b}", f" {a}{b}"], "answer": number % 3}
    for number, (word, a, b) in enumerate(
        [("red", "hot", "fox"), ("blue", "sea", "sky"), ("cab", "fed", "bad"), ("ace", "dab", "bed"), ("fig", "gab", "had")] * 2
    )
]
CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TEXT = """\
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in (("choice", CHOICE), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(task.replace("FILE", str(folder / "rows.jsonl")))
    return folder


def make_stage(folder: Path, **options: Any) -> EvaluateLmEval:
    return EvaluateLmEval.model_validate({"tasks": ["local_choice"], "task_folder": folder, **options})


def log_likelihood(model: Any, first: list[int], whole: list[int]) -> float:
    """Of the tokens of `whole` after those of `first`, one by one in fp64."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[place - 1, whole[place]]) for place in range(len(first), len(whole)))


def test_scores_are_those_of_plain_transformers(llama: Path, tasks: Path, tmp_path: Path) -> None:
    evaluation = run_stage(
        make_stage(tasks, tasks=["local_choice", "local_text"]), tmp_path / "step", model=open_folder(llama)
    ).task_scores
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    chosen = [
        max(range(3), key=lambda n, row=row: log_likelihood(model, ids(row["question"]), ids(row["question"] + row["choices"][n])))
        for row in ROWS
    ]
    right = sum(choice == row["answer"] for choice, row in zip(chosen, ROWS, strict=True))
    choice, text = evaluation.scores
    assert choice.metrics["acc"] == right / len(ROWS)
    assert (choice.samples, choice.higher_is_better["acc"]) == (10, True)
    total = sum(
        log_likelihood(model, [1], [1, *ids(row["question"])]) for row in ROWS
    )  # lm-eval puts a BOS before the tokenizer's own
    expected = torch.tensor(-total / sum(len(row["question"]) for row in ROWS)).exp().item()
    assert text.metrics["byte_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_pruned_model_is_what_is_measured(llama: Path, tasks: Path, tmp_path: Path) -> None:
    graph, stage = open_folder(llama), make_stage(tasks, tasks=["local_text"])
    dense = run_stage(stage, tmp_path / "a", model=graph).task_scores.scores[0]
    pruned = run_stage(stage, tmp_path / "b", model=graph.without_layers([1, 2])).task_scores.scores[0]
    assert dense.metrics != pruned.metrics


def test_scores_are_metrics_with_direction_and_standard_error(llama: Path, tasks: Path, tmp_path: Path) -> None:
    stage = make_stage(tasks, tasks=["local_choice", "local_text"], samples=4)
    scores = run_stage(stage, tmp_path / "step", model=open_folder(llama)).task_scores
    choice, text = scores.list_metrics()
    share = scores.scores[0].metrics["acc"]
    assert (choice.title, choice.value, choice.better) == ("acc on local_choice", share, "higher")
    assert choice.stderr == pytest.approx((share * (1 - share) / 3) ** 0.5)  # of a mean of four, each 0 or 1
    assert (text.title, text.better, text.stderr) == ("byte_perplexity on local_text", "lower", None)
    assert choice.setting == text.setting == "4 questions, 0-shot"


def test_whole_model_must_fit(llama: Path, tasks: Path, tmp_path: Path) -> None:
    stage = make_stage(tasks)
    with pytest.raises(
        CapacityError, match=r"lm-eval needs the whole model in memory, 0\.00 GiB, and of the memory allowed 0\.00 GiB"
    ):
        stage.run(stage.Inputs(model=open_folder(llama)), make_context(tmp_path / "step", memory=1 << 20))


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_in_a_recipe(llama: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    step = {"use": "evaluate_lm_eval", "with": {"tasks": ["local_choice"], "task_folder": "tasks", "samples": 4}}
    steps = [
        {"use": "prune", "with": {"layers": [2]}},
        step,
        {"use": "quantize_torchao", "with": {"to": "small"}},
        {**step, "id": "again"},
    ]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    result = gradmap("run", "r.yaml")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("local_choice: acc 0.") + result.stdout.count("local_choice: acc 0.") == 2
    assert re.search(r"acc on local_choice *\n(.*\n)+ *pruned +3 .* 0\.\d+ ± 0\.\d+ *\n *pruned, transformers int8", result.stdout)
    card = (tmp_path / "small" / "README.md").read_text()
    assert re.search(r"\| acc \| local_choice, 4 questions, 0-shot \| 0\.\d+ ± 0\.\d+ \| higher \|", card)
    limits = "again.limits={acc: {min: 1.1, min_ratio: 9}}"
    result = gradmap("run", "r.yaml", "--set", limits)
    assert result.exit_code == 5
    missed = (
        r"acc 0\.\d+ on 'local_choice' is under min 1\.1 by \d.*; acc 0\.\d+ on 'local_choice' is .* times that of the unpruned"
    )
    assert re.search(missed, result.stderr)

    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    result = gradmap("run", "r.yaml", "--json")
    cached = [json.loads(line)["cached"] for line in result.stdout.splitlines() if '"step_finished"' in line]
    assert cached == [True, False, True, False], "tasks count by what their folder holds"

    opened = harness.open_manager  # without lm-eval's own tasks, which take it ten seconds to list
    monkeypatch.setattr(
        harness, "open_manager", lambda folder, content, *, includes_defaults: opened(folder, content, includes_defaults=False)
    )
    result = gradmap("run", "r.yaml", "--set", "again.tasks=[local_chance]")
    assert result.exit_code == 2
    assert (
        "step 'again', option 'tasks' (--set again.tasks=[local_chance]): lm-eval has no task 'local_chance'; did you mean"
        in " ".join(result.stderr.split())
    )
    result = gradmap("check", "r.yaml", "--set", "again.task_folder=nowhere")
    assert result.exit_code == 2
    assert "'nowhere' is not a folder; name one that holds tasks as YAML files" in result.stderr


def test_wrong_kind_of_model_is_found_by_check(llama: Path, tmp_path: Path) -> None:
    steps = [
        {"use": "export", "with": {"format": "onnx", "to": str(tmp_path / "o")}},
        {"use": "evaluate_lm_eval", "with": {"tasks": ["x"]}, "from": {"model": "export.exported"}},
    ]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    result = gradmap("check", str(tmp_path / "r.yaml"))
    assert result.exit_code == 2
    said = "input 'model' takes a ModelGraph or TransformersFolder, but 'export.exported' is an OnnxFolder"
    assert said in " ".join(result.stderr.split())


def test_filters_and_errors_are_told_apart() -> None:
    results = {
        "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25, "em_stderr,strict": "N/A"}},
        "higher_is_better": {"t": {"acc": True, "em": None}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
        "versions": {"t": 1.0},
    }
    score = make_score("t", results)
    assert score.metrics == {"acc": 0.5, "em,strict": 0.25}
    assert score.errors == {"acc": 0.1}
    assert score.higher_is_better == {"acc": True}
    assert (score.samples, score.version) == (4, "1.0")


def test_nothing_of_git_on_the_terminal(llama: Path, tasks: Path, tmp_path: Path) -> None:
    """lm-eval asks git for a hash, in a process that writes where this one does."""
    step = {"use": "evaluate_lm_eval", "with": {"tasks": ["local_choice"], "task_folder": "tasks", "samples": 2}}
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [step]}))
    command = [sys.executable, "-m", "gradmap_pipeline", "run", "r.yaml", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
