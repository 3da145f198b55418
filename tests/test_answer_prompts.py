"""Answers to prompts: those of transformers, kept, counted where they repeat, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.answer_prompts import AnswerPrompts
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from gradmap_pipeline import (
    Answers,
    CapacityError,
    ModelSource,
    Prompts,
    StageError,
    TransformersFolder,
    agreeing_share,
    answer_prompts,
    describe_folder,
    open_model,
    repetition,
)
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.testing import make_context, run_stage

_PROMPTS = ["def read(self, size):\n", "import os"]


def test_answers_are_those_of_transformers(tmp_path: Path) -> None:
    model = open_model(ModelSource(builtin="docs-llama"))
    pruned = model.without_layers([5])
    answers: Answers = run_stage(AnswerPrompts(prompts=tuple(_PROMPTS), tokens=12), tmp_path, model=pruned).answers
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.base.folder)

    def generate(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            said = whole.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return str(tokenizer.decode(said, skip_special_tokens=True))

    assert [answer.base_answer for answer in answers.answers] == [generate(prompt) for prompt in _PROMPTS]
    del whole.model.layers[5]
    for place, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = place
    assert [answer.answer for answer in answers.answers] == [generate(prompt) for prompt in _PROMPTS]
    assert [answer.prompt for answer in answers.answers] == _PROMPTS
    assert answers.model == pruned.digest


def test_answers_end_where_the_model_ends_them(tmp_path: Path) -> None:
    base = open_folder(make_model(tmp_path / "model")).base
    (free,) = answer_prompts(open_folder(base.folder), Prompts(base, ["a text"], 6), make_context(tmp_path / "free"))
    assert len(free) == 6
    (base.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[2], 299]}))
    prompts = Prompts(base, ["a text"], 6)
    assert answer_prompts(open_folder(base.folder), prompts, make_context(tmp_path / "ended")) == [free[: free.index(free[2])]]


def test_chat_models_are_asked_through_their_template(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    prompts = Prompts(open_folder(folder).base, ["hi"], 4)
    assert prompts.decode(prompts.rows[0]) == "[user]hi[A]"
    assert Prompts(open_folder(folder).base, None, 4).texts[0].endswith("?")


def test_other_forms_of_a_model_answer_as_it_does(tmp_path: Path, llama: Path) -> None:
    graph = open_folder(llama)
    folder = TransformersFolder(graph=graph, folder=llama, files=describe_folder(llama))
    prompts = Prompts(graph.base, ["abc"], 5)
    context = make_context(tmp_path / "step")
    assert answer_prompts(folder, prompts, context) == answer_prompts(graph, prompts, context)


def test_answers_are_kept(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, kept = open_folder(llama), dict[str, Any]()

    def remember(key: Any, compute: Any) -> Any:
        name = json.dumps(key)
        kept[name] = kept[name] if name in kept else compute()
        return kept[name]

    context = replace(make_context(tmp_path / "step"), remember=remember)
    prompts = Prompts(graph.base, ["abc"], 5)
    first = answer_prompts(graph, prompts, context)
    assert answer_prompts(graph.model_copy(update={"label": "another"}), prompts, context) == first
    assert len(kept) == 1
    for other in (Prompts(graph.base, ["abd"], 5), Prompts(graph.base, ["abc"], 4)):
        answer_prompts(graph, other, context)
    answer_prompts(graph.without_layers([1]), prompts, context)
    assert len(kept) == 4


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4], 0.0), ([7] * 5, 0.5), ([7] * 12, 8 / 9), ([1, 2, 3, 4, 5, 1, 2, 3, 4], 1 / 6)],
)
def test_repetition_is_the_share_of_fours_that_stood_before(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)
    seen: list[list[int]] = []
    again = 0
    for at in range(len(ids) - 3):
        again += ids[at : at + 4] in seen
        seen.append(ids[at : at + 4])
    assert repetition(ids) == pytest.approx(again / max(1, len(seen)))


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, llama: Path) -> None:
    graph = open_folder(llama)
    context = replace(make_context(tmp_path / "step"), memory=1 << 20)
    with pytest.raises(
        CapacityError, match=r"answering prompts takes the whole model in memory, .* are left; use --dtype bfloat16, leave"
    ):
        answer_prompts(graph, Prompts(graph.base, ["abc"], 5), context)


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = open_folder(llama)
    folder = TransformersFolder(graph=graph, folder=llama, files=describe_folder(llama))
    monkeypatch.setattr(TransformersFolder, "open", lambda self, device: lambda batch: torch.full((1, 3, 300), torch.nan))
    with pytest.raises(StageError, match="the logits of the model are not finite in float32; compute in another --dtype"):
        answer_prompts(folder, Prompts(graph.base, ["abc"], 5), make_context(tmp_path / "step"))


def recipe_of(llama: Path, folder: Path, **options: Any) -> Path:
    steps = [{"use": "prune", "with": {"layers": [1]}}, {"use": "answer_prompts", "with": options}]
    (folder / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    return folder / "r.yaml"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompts": ["a", " "]}, "prompt 2 is empty; write what the model should answer"),
        ({"prompts": []}, "option 'prompts'"),
        ({"tokens": 0}, "option 'tokens'"),
        ({"prompts": ["abc"], "tokens": 64}, "found 64, and the prompt 'abc' has 4 tokens; the model is made for 64 together"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_a_run(llama: Path, tmp_path: Path, options: Any, told: str) -> None:
    result = CliRunner().invoke(app, ["check", str(recipe_of(llama, tmp_path, **options)), "--store", str(tmp_path / "store")])
    assert result.exit_code == 2
    assert told in result.stderr


@pytest.mark.parametrize(
    ("ours", "base", "share"),
    [
        ([], [], 1.0),
        ([1, 2], [1, 2], 1.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([5], [6], 0.0),
        ([], [1], 0),
    ],
)
def test_agreement_ends_at_the_first_token_that_differs(ours: list[int], base: list[int], share: float) -> None:
    assert agreeing_share(ours, base) == share


def test_limits_of_answers_stop_a_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = json.loads(recipe_of(llama, tmp_path, prompts=["<i>abc</i>", "x"], tokens=16).read_text())

    def run(least: float) -> Result:
        recipe["steps"][-1]["limits"] = {"agreement": {"min": least}, "repetition": {"max": 1}}
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        return CliRunner().invoke(app, ["run", "r.yaml"])

    assert run(0).exit_code == 0
    failed = run(1)
    assert failed.exit_code == 5
    assert "agreement" in failed.stderr.splitlines()[-1]


def test_answers_that_repeat_are_told_and_shown(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe_of(llama, tmp_path, prompts=["<i>abc</i>", "x"], tokens=16)
    ran = CliRunner().invoke(app, ["run", "r.yaml"])
    assert ran.exit_code == 0, ran.output
    assert CliRunner().invoke(app, ["report", "r.yaml"]).exit_code == 0
    page = Path("report.html").read_text()
    assert "&lt;i&gt;abc&lt;/i&gt;" in page
    record = json.loads(next(Path(".gradmap/runs").iterdir()).read_text())
    answers = record["steps"][-1]["outputs"]["answers"]["answers"]
    repeating = [answer["repetition"] >= 0.5 for answer in answers]
    assert page.count("Repeats itself.") == sum(repeating) + sum(answer["base_repetition"] >= 0.5 for answer in answers)
    which = ", ".join(str(number) for number, repeats in enumerate(repeating, 1) if repeats)
    told = f"warning: {sum(repeating)} of 2 answers of the pruned model repeat themselves: to prompt {which}\n"
    assert (told in ran.stdout) == any(repeating)
    mean = sum(answer["repetition"] for answer in answers) / 2
    assert record["models"][-1]["metrics"]["repetition"]["value"] == pytest.approx(mean)
