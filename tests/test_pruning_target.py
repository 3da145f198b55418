"""Targets: sizes from the files, perplexity by plain transformers, and what a recipe need not say twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gradmap_plugins import prune as prune_module
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.prune import Prune
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from gradmap_pipeline import CalibrationSet, Decision, LayerScores, ModelGraph, PruningTarget, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.stages.pruning_target import find_most, parse_count
from gradmap_pipeline.testing import run_stage

ORDER = [3, 1, 4, 2]


@pytest.fixture
def folder(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with a model of six layers and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    make_model(tmp_path / "model", num_hidden_layers=6)
    return tmp_path


def write_recipe(prune: dict[str, Any], score: dict[str, Any] | None = None, **model: Any) -> None:
    steps = [
        {"use": "calibrate", "with": {"dataset": {"path": "text.txt"}, "samples": 4, "sequence_length": 32}},
        {"use": "gradmap_score", "with": score or {}},
        {"use": "prune", "with": prune},
        {"use": "export", "with": {"to": "out"}},
    ]
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model", **model}, "steps": steps}))


def gradmap(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, "r.yaml", *arguments])


def sizes(file: Path) -> tuple[int, int]:
    """Parameters and bytes of a file of weights."""
    tensors = load_file(file).values()
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def layer_size(file: Path) -> int:
    return sum(tensor.numel() for name, tensor in load_file(file).items() if ".layers.0." in name)


@pytest.mark.parametrize(("more", "left"), [(0, 2), (-1, 1), (1, 2)])
def test_the_fewest_layers_go_for_a_size(folder: Path, more: int, left: int) -> None:
    """The ranking, which nothing tells how many decisions are wanted, prepares as many as they take."""
    whole, one = sizes(folder / "model/model.safetensors")[0], layer_size(folder / "model/model.safetensors")
    write_recipe({"target": {"parameters": whole - 4 * one + more}}, {"protect_first": 0, "protect_last": 0})
    result = gradmap("run")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == left
    assert sizes(Path("out/model.safetensors"))[0] == whole - (6 - left) * one
    lineage = {step["id"]: step for step in json.loads(Path("out/gradmap.json").read_text())["steps"]}
    assert lineage["gradmap_score"]["options"]["layers"] == 6 - left


def test_bytes_are_those_of_the_type_that_the_recipe_names(folder: Path) -> None:
    whole, one = sizes(folder / "model/model.safetensors")[0], layer_size(folder / "model/model.safetensors")
    write_recipe({"target": {"bytes": 2 * (whole - 2 * one)}}, dtype="bfloat16")
    assert gradmap("run").exit_code == 0
    assert sizes(Path("out/model.safetensors")) == (whole - 2 * one, 2 * (whole - 2 * one))


def test_a_ratio_is_said_once(folder: Path) -> None:
    write_recipe({"ratio": 0.5})
    assert gradmap("run").exit_code == 0
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 3
    write_recipe({"ratio": 0.5}, {"ratio": 0.3})
    assert "removes 3 of 6 layers, but only 2 removals are scored; set the same 'ratio'" in gradmap("check").stderr


def test_the_ranking_prepares_what_the_largest_of_several_removals_needs(folder: Path) -> None:
    write_recipe({"layers": 1})
    recipe = json.loads(Path("r.yaml").read_text())
    recipe["steps"][3:] = [{"use": "prune", "id": "more", "from": {"model": "model.model"}, "with": {"layers": 3}}]
    Path("r.yaml").write_text(json.dumps(recipe))
    result = gradmap("run", "--json")
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    (scores,) = [event["outputs"]["scores"] for event in events if event.get("stage") == "gradmap_score" and "outputs" in event]
    assert len(scores["decisions"]) == 3


# Perplexity


def make_scores(model: ModelGraph) -> LayerScores:
    decisions = tuple(Decision(removed=layer, scores={layer: 0.0}, removed_if_unprotected=layer) for layer in ORDER)
    return LayerScores(model=model.digest, method="by hand", decisions=decisions)


def true_loss(model: ModelGraph, calibration: CalibrationSet, removed: list[int]) -> float:
    """Mean loss in plain transformers, fp64."""
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64).eval()
    whole.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(whole.model.layers) if index not in removed)
    ids = calibration.load()[0]
    with torch.no_grad():
        logits = whole(input_ids=ids, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_the_most_layers_go_that_hold_a_perplexity(folder: Path) -> None:
    model = open_folder(folder / "model")
    stage = Calibrate.model_validate({"dataset": {"path": "text.txt"}, "samples": 4, "sequence_length": 32})
    calibration = run_stage(stage, folder / "calibration", model=model).calibration
    whole = true_loss(model, calibration, [])
    ratios = [math.exp(true_loss(model, calibration, ORDER[:count]) - whole) for count in range(1, 5)]
    given = {"model": model, "scores": make_scores(model), "calibration": calibration}
    for count in range(1, 5):
        limit = ratios[count - 1] * (1 + 1e-5)
        held = max(number for number in range(1, 5) if ratios[number - 1] <= limit)
        if ratios != sorted(ratios) or limit <= 1:
            continue  # a random model may do better without a layer
        pruned = run_stage(Prune.model_validate({"target": {"max_perplexity_ratio": limit}}), folder / f"{count}", **given).model
        assert pruned.removed == tuple(sorted(ORDER[:held]))
    least = min(ratios)
    if least > 1.0001:
        with pytest.raises(StageError, match=r"perplexity of the model on the calibration set is .* aim at that or more"):
            run_stage(Prune.model_validate({"target": {"max_perplexity_ratio": 1.00001}}), folder / "none", **given)


@pytest.mark.parametrize("most", [1, 2, 7, 8])
def test_bisection_finds_the_last_that_holds(most: int) -> None:
    for last in range(most + 1):
        assert find_most(lambda count, last=last: count <= last, most) == last


# Refusals


def test_numbers_of_parameters() -> None:
    assert [parse_count(text) for text in ("110M", "1.5b", "350K", "12", 7)] == [110_000_000, 1_500_000_000, 350_000, 12, 7]
    for text in ("110MB", "", "M", "-1", "1e9", "१"):
        with pytest.raises(ValueError, match="accepted: a number of parameters such as 110M"):
            parse_count(text)


@pytest.mark.parametrize(
    ("target", "found"), [({}, "none"), ({"parameters": 5, "bytes": 5}, "parameters and bytes"), ({"parameters": 0}, "greater")]
)
def test_one_target_is_given(target: dict[str, Any], found: str) -> None:
    with pytest.raises(ValidationError, match=found):
        PruningTarget.model_validate(target)
    with pytest.raises(ValidationError, match="give one of 'ratio', 'layers' and 'target'; found 'ratio' and 'target'"):
        Prune.model_validate({"ratio": 0.5, "target": {"parameters": 5}})


def test_what_cannot_be_reached_is_refused_with_the_nearest(folder: Path) -> None:
    whole, one = sizes(folder / "model/model.safetensors")[0], layer_size(folder / "model/model.safetensors")
    least = f"{whole - 4 * one:,}"
    write_recipe({"target": {"parameters": 10}})
    for command in ("check", "run"):
        result = gradmap(command)
        assert result.exit_code == 2
        assert (
            f"10 parameters cannot be reached: at most 4 of 6 layers can be removed, which leaves {least}; aim at that"
            in result.stderr
        )
    write_recipe({"target": {"parameters": whole}})
    assert (
        f"option 'target': the model has {whole:,} parameters, and {whole:,} are aimed at; leave this step out"
        in gradmap("check").stderr
    )
    write_recipe({"target": {"parameters": whole - 3 * one}}, {"layers": 2})
    assert "takes at least 3 of 6 layers, but only 2 removals are scored; leave 'ratio' and 'layers' out" in gradmap("check").stderr


def test_a_target_needs_scores_and_perplexity_a_text(folder: Path) -> None:
    write_recipe({"target": {"parameters": "10k"}})
    recipe = json.loads(Path("r.yaml").read_text())
    steps = recipe["steps"]
    for kept, message in (
        ([0, 2], "nothing says which layers to remove; put gradmap_score before this step"),
        ([0, 1, 2], "the scored layers were chosen to go together; give this step and that one the same 'ratio'"),
        ([3, 2], "perplexity is measured on the calibration set; put calibrate before this step"),
    ):
        chosen = [dict(steps[index]) for index in kept]
        if kept == [0, 1, 2]:
            chosen[1] = {"use": "angular_score"}
        if kept == [3, 2]:
            chosen = [{"use": "last_layers_score"}, {"use": "prune", "with": {"target": {"max_perplexity_ratio": 1.5}}}]
        Path("r.yaml").write_text(json.dumps({**recipe, "steps": chosen}))
        result = gradmap("check")
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_model_that_is_elsewhere_has_no_size_yet(folder: Path) -> None:
    write_recipe({"target": {"parameters": "100M"}})
    recipe = json.loads(Path("r.yaml").read_text())
    Path("r.yaml").write_text(json.dumps({**recipe, "model": {"id": "nobody/nothing"}}))
    assert "how large the model is shows when it is on this machine; download it first, or give 'ratio'" in gradmap("check").stderr


def fake_rates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Six layers give 100 / 7 tokens/s, five 100 / 6, and so on. Returns the layers of the models that are timed."""
    timed: list[int] = []

    def measure(model: ModelGraph, *_: Any, **__: Any) -> Any:
        timed.append(len(model.layers))
        rate = 100 / (1 + len(model.layers))
        return SimpleNamespace(cases=[SimpleNamespace(rates=SimpleNamespace(decode=(rate, rate / 2, rate * 2)))])

    monkeypatch.setattr(prune_module, "measure_speed", measure)
    return timed


@pytest.mark.parametrize(("limit", "left"), [(100 / 6, 5), (16.7, 4), (20, 4), (24.9, 3)])
def test_the_fewest_layers_go_for_a_speed(folder: Path, limit: float, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rates(monkeypatch)
    write_recipe({"target": {"tokens_per_second": limit}})
    result = gradmap("run")
    assert result.exit_code == 0, result.output
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == left
    assert f"decoding without {6 - left} of 6 layers: {100 / (1 + left):.3g} tokens/s on this machine, 14.3 before" in result.stdout


def test_a_speed_is_measured_once_on_a_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = fake_rates(monkeypatch)
    write_recipe({"target": {"tokens_per_second": 20}})
    assert gradmap("run", "--threads", "1").exit_code == 0
    assert len(timed) == len(set(timed)) > 0
    before = len(timed)
    assert gradmap("run", "--threads", "1").exit_code == 0
    assert len(timed) == before
    assert gradmap("run", "--threads", "2").exit_code == 0
    assert len(timed) == 2 * before


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (14, "the model gives 14.3 tokens/s on this machine with all its 6 layers, and 14 are aimed at; leave this step out"),
        (
            26,
            "26 tokens/s cannot be reached on this machine: without 3 of 6 layers, as many as are scored, the model gives 25, and ",
        ),
    ],
)
def test_a_speed_that_is_there_or_out_of_reach(folder: Path, limit: float, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_rates(monkeypatch)
    write_recipe({"target": {"tokens_per_second": limit}})
    assert gradmap("check").exit_code == 0
    result = gradmap("run")
    assert (result.exit_code, told in result.stderr) == (4, True), result.stderr


def test_a_real_model_is_timed(folder: Path) -> None:
    """What no machine does is out of reach, with the rates that were measured."""
    write_recipe({"target": {"tokens_per_second": 1e9}})
    assert gradmap("plan").exit_code == 0
    result = gradmap("run")
    assert (result.exit_code, "1e+09 tokens/s cannot be reached on this machine" in result.stderr) == (4, True), result.stderr
