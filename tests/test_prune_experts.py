"""Experts: scores against the formula on whole models, and what is left against the model with those experts masked out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.prune import Prune
from gradmap_plugins.prune_experts import PruneExperts
from pydantic import ValidationError
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result
from walk import make_model

from gradmap_pipeline import CalibrationSet, ModelGraph, find_experts
from gradmap_pipeline.checkpoint.experts import SUPPORTED
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.testing import run_stage

QUICK = ("mixtral", "qwen3_moe", "gpt_oss")
MIXTURES = ("olmoe", "deepseek_v3", "ernie4_5_moe", "granitemoe", "qwen3_5_moe", "nemotron_h")
"""Of several layouts: the rest takes a minute."""


def mark(kind: str) -> Any:
    marks = [] if kind in QUICK else [pytest.mark.full if kind in MIXTURES else pytest.mark.slow]
    return pytest.param(kind, marks=marks)


def make_inputs(kind: str, folder: Path) -> tuple[ModelGraph, CalibrationSet]:
    text = folder / "text.txt"
    text.write_text("".join(f"{number} is {number * number % 97}; " for number in range(2000)))
    model = open_folder(make_model(folder / "model", kind))
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 6, "sequence_length": 24})
    return model, run_stage(stage, folder / "calibration", model=model).calibration


def layer_in(name: str) -> int:
    """The layer that a parameter of a module is of; -1 where it is of none."""
    numbers = re.findall(r"\blayers\.(\d+)\.", name)
    return int(numbers[0]) if numbers else -1


@contextmanager
def masking(module: Any, removed: dict[int, set[int]]) -> Iterator[None]:
    """Routers never choose the experts removed, by layer."""
    real = torch.nn.functional.linear
    routers: dict[int, set[int]] = {}
    for name, parameter in module.named_parameters():
        if (layer := layer_in(name)) in removed and set(name.split(".")) & {"gate", "router"} and name.endswith("weight"):
            routers[id(parameter)] = removed[layer]
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if (layer := layer_in(name)) in removed and name.endswith(("correction_bias", "expert_bias")):
            tensor.data[..., sorted(removed[layer])] = -1e9

    def linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = real(values, weight, bias)
        if id(weight) in routers:
            output = output.clone()
            output[..., sorted(routers[id(weight)])] = -1e9
        return output

    assert routers
    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = real


@pytest.mark.parametrize("kind", [mark(kind) for kind in sorted(SUPPORTED)])
def test_what_is_left_is_the_model_with_experts_masked_out(kind: str, tmp_path: Path) -> None:
    model, calibration = make_inputs(kind, tmp_path)
    result = run_stage(PruneExperts(experts=1), tmp_path / "stage", model=model, calibration=calibration)
    count = find_experts(model).count
    removed = {layer: set(range(count)) - set(kept) for layer, kept in result.experts.kept.items()}
    assert removed
    assert all(len(gone) == 1 for gone in removed.values())
    ids = calibration.load()[0]
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float32).eval()
    left = AutoModelForCausalLM.from_pretrained(result.model.base.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = whole(input_ids=ids, use_cache=False).logits
        with masking(whole, removed):
            expected = whole(input_ids=ids, use_cache=False).logits
        found = left(input_ids=ids, use_cache=False).logits
    scale = float(plain.abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * scale
    assert float((found - plain).abs().max()) > 1e-3 * scale
    assert find_experts(result.model).count == count - 1


def test_scores_are_those_of_the_formula(tmp_path: Path) -> None:
    """Mixtral's experts, one token at a time in fp64."""
    model, calibration = make_inputs("mixtral", tmp_path)
    scores = run_stage(PruneExperts(experts=1), tmp_path / "stage", model=model, calibration=calibration).experts.scores
    counts = run_stage(
        PruneExperts(experts=1, criterion="frequency"), tmp_path / "other", model=model, calibration=calibration
    ).experts.scores
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder, dtype=torch.float64, experts_implementation="eager").eval()
    layer = 2
    block: Any = whole.model.layers[layer].mlp
    entering: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    with torch.no_grad():
        whole(input_ids=calibration.load()[0], use_cache=False)
        handle.remove()
        hidden = entering[0].flatten(0, 1)
        shares = (hidden @ block.gate.weight.T).softmax(-1)
        sums, tokens = torch.zeros(4).double(), torch.zeros(4)
        for token, share in zip(hidden, shares, strict=True):
            best = share.topk(whole.config.num_experts_per_tok)
            for weight, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
                output = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                sums[expert] += weight * output.norm()
                tokens[expert] += 1
    assert scores[layer] == pytest.approx((sums / tokens.clamp(min=1)).tolist(), rel=1e-4)
    assert counts[layer] == tokens.tolist()


def test_the_least_go_and_ties_go_from_the_end(tmp_path: Path) -> None:
    model, calibration = make_inputs("mixtral", tmp_path)
    result = run_stage(PruneExperts(ratio=0.5), tmp_path / "stage", model=model, calibration=calibration).experts
    for layer, scores in result.scores.items():
        assert min(scores[expert] for expert in result.kept[layer]) >= max(
            scores[expert] for expert in range(4) if expert not in result.kept[layer]
        )


@pytest.mark.full
def test_layers_go_before_or_after(tmp_path: Path) -> None:
    """In either order, what is left has the same layers and as many experts."""
    model, calibration = make_inputs("mixtral", tmp_path)
    drawn = PruneExperts(experts=1, criterion="random")
    first = run_stage(drawn, tmp_path / "a", model=model, calibration=calibration).model
    one = run_stage(Prune(layers=[0, 3]), tmp_path / "b", model=first).model
    pruned = run_stage(Prune(layers=[0, 3]), tmp_path / "c", model=model).model
    result = run_stage(drawn, tmp_path / "d", model=pruned, calibration=calibration)
    assert (one.base.layers, one.layers, result.model.base.layers) == (6, (1, 2, 4, 5), 4)
    shapes = [sorted((tensor.shape for tensor in graph.export_tensors().values()), key=str) for graph in (one, result.model)]
    assert shapes[0] == shapes[1]
    assert list(result.experts.kept) == [1, 2, 4, 5]


def write_recipe(folder: Path, kind: str, **options: Any) -> None:
    make_inputs(kind, folder)
    data = {"dataset": {"path": "text.txt"}, "samples": 4, "sequence_length": 24}
    steps = [
        {"use": "calibrate", "with": data},
        {"use": "prune_experts", "with": options},
        {"use": "gradmap_score", "with": {"layers": 1}},
        {"use": "prune", "with": {"layers": 1}},
        {"use": "evaluate", "with": data},
        {"use": "export", "with": {"to": "out"}},
    ]
    (folder / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))


def gradmap(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, "r.yaml", *arguments])


@pytest.mark.full
def test_a_recipe_removes_experts_then_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export says what it is, the same bytes come again, and a store that was moved still has the model."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, "qwen3_moe", experts=2)
    config = json.loads(Path("model/config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")  # as on the hub
    Path("model/config.json").write_text(json.dumps(config))
    assert gradmap("check").exit_code == 0
    result = gradmap("run")
    assert result.exit_code == 0, result.output
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_experts"], config["num_hidden_layers"]) == (2, 5)
    assert "num_local_experts" not in config
    before = Path("out/model.safetensors").read_bytes()
    Path(".gradmap").rename("moved")
    again = gradmap("run", "--store", "moved", "--set", "export.to=again")
    assert again.exit_code == 0, again.output
    assert "prune_experts: done (from the store)" in again.stdout
    assert Path("again/model.safetensors").read_bytes() == before


def test_what_cannot_be_pruned_is_refused_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, "mixtral", experts=3)
    result = gradmap("check")
    assert result.exit_code == 2
    assert "option 'experts': removing 3 of 4 experts leaves 1, and each token is sent to 2; remove 2 at most" in " ".join(
        result.stderr.split()
    )
    with pytest.raises(ValidationError, match="give 'ratio' or 'experts', not both"):
        PruneExperts(ratio=0.5, experts=1)


def test_a_model_without_experts_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="llama has no experts: its config has none of num_experts, num_local_experts"):
        find_experts(open_folder(llama))


def test_the_docs_name_all_that_were_tried() -> None:
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    part = page[page.index("## Mixtures of experts") : page.index("## A model that drafts")]
    assert set(re.findall(r"`(\w+)`", part[part.index("Those that were:") :])) == SUPPORTED


def test_a_layout_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="experts of llama4_text cannot be cut out; those of these model types can: aria_text, "):
        find_experts(open_folder(make_model(tmp_path / "model", "llama4_text")))
