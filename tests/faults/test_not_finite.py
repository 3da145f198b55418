"""Infinities and NaN are told where they arise, by the name of the tensor; none gets into a result, an export or JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import make_model
from typer.testing import CliRunner, Result

from gradmap_pipeline import Artifact, StageError
from gradmap_pipeline.checkpoint.casts import cast
from gradmap_pipeline.cli import app
from gradmap_pipeline.stages.perplexity import perplexity_of

pytestmark = pytest.mark.full

GATE = "model.layers.2.mlp.gate_proj.weight"
EVALUATE = "  - use: evaluate\n    with: {dataset: {path: TEXT}, samples: 4, sequence_length: 16}\n"
CALIBRATE = "  - use: calibrate\n    with: {dataset: {path: TEXT}, samples: 4, sequence_length: 16}\n"


class Measured(Artifact):
    values: dict[str, list[float]]


def spoil(folder: Path, name: str, value: float) -> None:
    """Put one value into a tensor of a model."""
    file = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})


def run(folder: Path, text: Path, steps: str, *options: str, model: str = "{path: model}") -> Result:
    (folder / "r.yaml").write_text(f"version: 1\nmodel: {model}\nsteps:\n{steps}".replace("TEXT", str(text)))
    return CliRunner().invoke(app, ["run", "r.yaml", *options])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [GATE, "model.embed_tokens.weight"])
def test_export_in_a_type_that_the_weights_do_not_fit_is_refused(name: str, folder: Path, text: Path) -> None:
    spoil(folder / "model", name, 1e5)
    steps = "  - use: prune\n    with: {layers: [1]}\n  - use: export\n    with: {to: out}\n"
    result = run(folder, text, steps, model="{path: model, dtype: float16}")
    assert result.exit_code == 4, result.output
    assert f"1 of the {64 * 32 if name == GATE else 300 * 32:,} values of {name!r} do not fit into float16" in result.stderr
    assert "they would become infinite; set 'dtype' under 'model' to float32 or bfloat16" in result.stderr
    assert not (folder / "out").exists()


def test_graph_in_float16_that_the_weights_do_not_fit_is_refused(folder: Path, text: Path) -> None:
    spoil(folder / "model", GATE, 1e5)
    export = "  - use: export\n    with: {to: out, format: onnx, onnx: {dtype: float16}}\n"
    result = run(folder, text, export)
    assert result.exit_code == 4, result.output
    assert f"values of {GATE!r} do not fit into float16" in result.stderr, result.stderr
    assert not (folder / "out").exists()


def test_computing_in_a_type_that_the_weights_do_not_fit_is_refused(folder: Path, text: Path) -> None:
    spoil(folder / "model", GATE, 1e5)
    result = run(folder, text, EVALUATE, "--dtype", "float16")
    assert result.exit_code == 4, result.output
    assert f"values of {GATE!r} do not fit into float16" in result.stderr
    assert "use --dtype float32 or bfloat16" in result.stderr
    assert run(folder, text, EVALUATE).exit_code == 0


@pytest.mark.parametrize(
    ("name", "layer", "value"),
    [
        (GATE, " of layer 2", math.nan),
        (GATE, " of layer 2", math.inf),
        (GATE, " of layer 2", -math.inf),
        ("model.embed_tokens.weight", "", math.inf),
        ("model.norm.weight", "", -math.inf),
        ("lm_head.weight", "", math.nan),
    ],
)
def test_evaluation_names_the_tensor_that_is_not_finite(name: str, layer: str, value: float, folder: Path, text: Path) -> None:
    spoil(folder / "model", name, value)
    if name == "model.embed_tokens.weight":  # a row that the text uses
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model" / "model.safetensors").items()}
        tensors[name][:, 3] = value
        save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    result = run(folder, text, EVALUATE, "--json")
    assert result.exit_code == 4, result.output
    error = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()][-1]
    assert error["where"] == "step 'evaluate'"
    assert f"the tensor {name!r}{layer} has " in error["message"]
    assert "values that are not finite" in error["message"]


@pytest.mark.parametrize(
    "steps",
    [
        CALIBRATE + "  - use: gradmap_score\n    with: {layers: 1}\n",
        CALIBRATE + "  - use: gradmap_score\n    with: {layers: 1, metric: weight_gradient}\n",
        CALIBRATE + "  - use: shortgpt_score\n    with: {layers: 1}\n",
        CALIBRATE + "  - use: taylor_score\n    with: {layers: 1, protect_first: 0, protect_last: 0}\n",
        "  - use: magnitude_score\n    with: {layers: 1}\n",
        CALIBRATE + "  - use: prune\n    with: {layers: [1]}\n  - use: project_compensate\n",
        "  - use: prune\n    with: {layers: [1]}\n  - use: export\n    with: {to: out}\n",
    ],
    ids=["score", "weights", "shortgpt", "taylor", "magnitude", "correct", "export"],
)
def test_every_stage_names_the_layer_whose_weight_is_not_a_number(steps: str, folder: Path, text: Path) -> None:
    """A NaN in layer 2 is not told as an overflow somewhere else."""
    spoil(folder / "model", GATE, math.nan)
    if "magnitude" in steps:
        steps = CALIBRATE + steps
    result = run(folder, text, steps)
    assert result.exit_code == 4, result.output
    assert f"{GATE!r} of layer 2" in result.stderr, result.stderr
    assert not (folder / "out").exists()


def test_artifacts_hold_finite_numbers() -> None:
    assert Measured(values={"a": [1.0]}).values["a"] == [1.0]
    for value in (math.nan, math.inf):
        with pytest.raises(ValidationError, match="finite number"):
            Measured(values={"a": [0.0, value]})


def test_perplexity_beyond_the_largest_number_is_an_error() -> None:
    assert perplexity_of(2.0, "text") == pytest.approx(math.exp(2.0))
    with pytest.raises(StageError, match="the mean loss on 'text' is 800 nats a token"):
        perplexity_of(800.0, "text")


@pytest.mark.parametrize(
    ("source", "target", "largest"),
    [(torch.float32, torch.float16, 65504.0), (torch.float64, torch.float32, 3.4e38), (torch.float32, torch.bfloat16, 3.38e38)],
)
def test_casts_count_what_becomes_infinite(source: torch.dtype, target: torch.dtype, largest: float) -> None:
    beyond = torch.finfo(source).max
    values = torch.tensor([largest, -beyond, math.inf, math.nan, 1e-30, beyond], dtype=source)
    made, lost = cast(values, target)
    assert lost == 2
    assert torch.equal(made[[0, 4]], values[[0, 4]].to(target))


def test_casts_to_a_wider_range_lose_nothing() -> None:
    values = torch.tensor([65504.0, math.inf], dtype=torch.float16)
    assert cast(values, torch.float32)[1] == cast(values, torch.bfloat16)[1] == 0
