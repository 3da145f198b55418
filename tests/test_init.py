"""`gradmap init`: what it writes plans, runs, and says what had to give way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from gradmap_plugins.lookahead_score import LookaheadScore
from tiny import make_model
from typer.testing import CliRunner, Result
from walk import make_model as make_any_model

from gradmap_pipeline import OptionError
from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.machine import Machine
from gradmap_pipeline.recipe.plan import Plan
from gradmap_pipeline.run import starting_recipe
from gradmap_pipeline.run.costs import PlanCosts, StepCost
from gradmap_pipeline.run.starting_recipe import QUANTISATIONS, Start, write_starting_recipe


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with a model of four layers."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    return tmp_path


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_what_is_written_runs(folder: Path) -> None:
    result = gradmap("init", "model", "--ratio", "0.5", "--chat")
    assert (result.exit_code, result.stdout) == (0, "wrote recipe.yaml: gradmap plan recipe.yaml; gradmap run recipe.yaml\n")
    text = Path("recipe.yaml").read_text()
    assert text.startswith("# model: 4 layers, ")
    recipe = yaml.safe_load(text)
    assert [step["use"] for step in recipe["steps"]] == [
        *(
            "evaluate",
            "calibrate",
            "lookahead_score",
            "prune",
            "evaluate",
            "project_compensate",
            "evaluate",
            "answer_prompts",
            "export",
        )
    ]
    assert recipe["steps"][3]["with"] == {"ratio": 0.5}
    assert recipe["steps"][1]["with"]["sequence_length"] == 64  # what the model is made for
    smaller = [f"--set={step}.samples=4" for step in ("evaluate_dense", "calibrate", "evaluate_pruned", "evaluate")]
    ran = gradmap("run", "recipe.yaml", "--set", "answer_prompts.tokens=4", *smaller)
    assert ran.exit_code == 0, ran.output
    assert json.loads(Path("out/model-pruned/config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("target", "given"), [("parameters=50K", "50K"), ("max_perplexity_ratio=1.5", 1.5), ("bytes=200000", 200000)]
)
def test_a_target_is_taken_over(target: str, given: object) -> None:
    assert gradmap("init", "model", "--target", target).exit_code == 0
    prune = next(step for step in yaml.safe_load(Path("recipe.yaml").read_text())["steps"] if step["use"] == "prune")
    assert list(prune["with"]["target"].values()) == [given]


@pytest.mark.full
def test_kinds_of_layers_and_places_of_a_correction_give_way(folder: Path) -> None:
    """What `check` would refuse is not written."""
    make_any_model(folder / "gemma", "gemma3_text")
    result = gradmap("init", "gemma", "--ratio", "0.34")
    assert result.exit_code == 0, result.output
    assert gradmap("check", "recipe.yaml").exit_code == 0


def test_a_ranking_that_is_refused_gives_way_before_the_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OptionError("sample_share", "no")

    monkeypatch.setattr(LookaheadScore, "inspect", refuse)
    assert gradmap("init", "model").exit_code == 0
    uses = [step["use"] for step in yaml.safe_load(Path("recipe.yaml").read_text())["steps"]]
    assert "lookahead_score" not in uses
    assert {"gradmap_score", "project_compensate"} <= set(uses)


def test_a_form_is_quantised_after_the_export_that_it_takes() -> None:
    for form, (stage, _, _) in QUANTISATIONS.items():
        text = write_starting_recipe(Start(model={"path": "m"}, title="m", out="m", prune={"ratio": 0.25}, quantisation=form))
        steps = [step["use"] for step in yaml.safe_load(text)["steps"]]
        assert steps[-1] == stage
        assert ("export" in steps) == (form == "onnx")


def test_less_text_is_taken_where_memory_is_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first amount of which every step fits."""
    real = starting_recipe.estimate_plan

    def estimate(plan: Plan, machine: Machine, store: Path) -> PlanCosts | None:
        costs = real(plan, machine, store)
        assert costs is not None
        samples = plan.steps[1].stage.model_dump()["samples"]
        return replace(costs, steps=[StepCost("calibrate", None, None, "too much")]) if samples > 32 else costs

    assert gradmap("init", "model", "--to", "a.yaml").exit_code == 0
    monkeypatch.setattr(starting_recipe, "estimate_plan", estimate)
    assert gradmap("init", "model", "--to", "b.yaml").exit_code == 0
    amounts = [yaml.safe_load(Path(name).read_text())["steps"][1]["with"]["samples"] for name in ("a.yaml", "b.yaml")]
    assert amounts == [128, 32]


def test_wrong_arguments(folder: Path) -> None:
    Path("there.yaml").write_text("mine")
    for arguments, code, message in (
        (("model", "--to", "there.yaml"), 2, "--to 'there.yaml' is there already; name another file, or move that one away"),
        (("model", "--ratio", "0.5", "--target", "bytes=1KB"), 2, "give --ratio or --target, not both"),
        (("model", "--target", "layers=3"), 2, "--target: found 'layers=3', accepted: parameters=VALUE, bytes=VALUE"),
        (("model", "--quantise", "int2"), 2, "--quantise: found 'int2', accepted: onnx, torchao, gguf"),
        (("nowhere",), 2, "no folder 'nowhere'"),
        (("model", "--target", "parameters=10"), 2, "10 parameters cannot be reached"),
        (("model", "--ratio", "2"), 2, "option 'ratio'"),
    ):
        result = gradmap("init", *arguments)
        assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert Path("there.yaml").read_text() == "mine"
    assert not Path("recipe.yaml").exists()


def test_what_comes_next_has_the_options_given_and_a_chat_model_is_told(folder: Path) -> None:
    settings = Path("model/tokenizer_config.json")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    told = gradmap("init", "model", "--to", "a.yaml", "--dtype", "bfloat16", "--threads", "1").stdout.splitlines()
    assert told == [
        "this model answers chats: with --chat the recipe has both models answer prompts",
        "wrote a.yaml: gradmap plan a.yaml --dtype bfloat16 --threads 1; gradmap run a.yaml --dtype bfloat16 --threads 1",
    ]
