"""llm-compressor in an environment of its own: what is checked before, and (slow) what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.quantize_llmcompressor import QuantizeLlmcompressor
from gradmap_plugins.quantize_torchao import QuantizeTorchao
from tiny import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from gradmap_pipeline.checkpoint.graph import ModelGraph, open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import StageError
from gradmap_pipeline.export import quantised
from gradmap_pipeline.export.quantised import write_quantised
from gradmap_pipeline.stages.targets import new_folder
from gradmap_pipeline.testing import make_context

pytestmark = pytest.mark.full

TEXT = {"samples": 16, "sequence_length": 32}


def quantise(graph: ModelGraph, folder: Path, method: Callable[[Path], Any]) -> None:
    with new_folder(folder / "out", overwrite=False) as new:
        write_quantised(graph, new, "safetensors", "test", method, QuantizeTorchao(to=new.target), make_context(folder / "step"))


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def write_recipe(folder: Path, model: Path, *steps: dict[str, Any]) -> str:
    recipe = folder / "r.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": steps}))
    return str(recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w4a16", "smoothquant": 0.5}, "'smoothquant' belongs to scheme 'w8a8'; the scheme is 'w4a16'"),
        ({"scheme": "w8a8", "group_size": 32}, "'group_size' belongs to schemes 'w4a16' and 'w8a16'; the scheme is 'w8a8'"),
        ({"scheme": "fp8", "method": "gptq"}, "scheme 'fp8' rounds to nearest; leave 'method' out, or choose an integer scheme"),
        ({}, "option 'method': needs a calibration set; put calibrate before this step, or use method: rtn"),
        ({"scheme": "w8a8", "method": "rtn", "smoothquant": 0.5}, "option 'smoothquant': needs a calibration set; put calibrate"),
    ],
)
def test_what_does_not_go_together(llama: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    recipe = write_recipe(tmp_path, llama, {"use": "quantize_llmcompressor", "with": {"to": str(tmp_path / "o"), **options}})
    result = gradmap("check", recipe)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("options", [{"method": "rtn"}, {"scheme": "fp8"}, {"scheme": "w8a8", "method": "rtn"}])
def test_rounding_to_nearest_needs_no_text(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = write_recipe(tmp_path, llama, {"use": "quantize_llmcompressor", "with": {"to": str(tmp_path / "o"), **options}})
    assert gradmap("check", recipe).exit_code == 0


def test_quantised_model_is_closed_to_pruning(llama: Path, tmp_path: Path) -> None:
    steps = [
        {"use": "quantize_llmcompressor", "with": {"to": str(tmp_path / "o"), "method": "rtn"}},
        {"use": "prune", "with": {"layers": [1]}},
    ]
    result = gradmap("check", write_recipe(tmp_path, llama, *steps))
    assert result.exit_code == 2
    assert "step 'prune' takes a ModelGraph as 'model', but after step 'quantize_llmcompressor' it is a Trans" in result.stderr


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def test_folder_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = open_folder(make_model(tmp_path / "model"))
    logits = quantised._logits

    def drift(model: Any, seed: int) -> torch.Tensor:
        again = "partial" in str(getattr(model.config, "_name_or_path", ""))
        return logits(model, seed) + (0.1 if again else 0.0)

    monkeypatch.setattr(quantised, "_logits", drift)
    with pytest.raises(StageError, match=r"does not compute what the quantised model does: logits differ by up to 0\.1; nothing"):
        quantise(graph, tmp_path, load)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    graph = open_folder(make_model(tmp_path / "model"))

    def spoil(folder: Path) -> Any:
        model = load(folder)
        model.lm_head.weight.data[0, 0] = math.nan
        return model

    with pytest.raises(StageError, match="computes values that are not finite; nothing was written"):
        quantise(graph, tmp_path, spoil)
    assert not (tmp_path / "out").exists()


def test_config_keeps_the_older_form_of_rotary_parameters(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    graph = open_folder(make_model(tmp_path / "model", rope_parameters=rope)).without_layers([1])
    quantise(graph, tmp_path, load)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_parameters"], config["num_hidden_layers"]) == (50000.0, rope, 3)


def test_groups_divide_every_width() -> None:
    pytest.importorskip("compressed_tensors")
    from gradmap_pipeline import OptionError

    model = torch.nn.Sequential(torch.nn.Linear(96, 8), torch.nn.Linear(64, 8))
    assert QuantizeLlmcompressor(to=Path("o"))._choose_group_size(model) == 32
    assert QuantizeLlmcompressor(to=Path("o"), ignore=["0"])._choose_group_size(model) == 64
    with pytest.raises(OptionError, match="'0' has 96 inputs, which groups of 128 do not divide; set another, or ignore it"):
        QuantizeLlmcompressor(to=Path("o"), group_size=128)._choose_group_size(model)


@pytest.mark.slow
def test_every_scheme_in_a_managed_environment(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    heldout = {"dataset": {"path": str(text)}, **TEXT}
    schemes: list[dict[str, Any]] = [
        {"scheme": "w4a16"},
        {"scheme": "w4a16", "method": "rtn"},
        {"scheme": "w8a16"},
        {"scheme": "w8a8", "smoothquant": 0.5},
        {"scheme": "fp8"},
    ]
    differences = []
    for number, options in enumerate(schemes):
        steps = [
            {"use": "calibrate", "with": {"dataset": {"path": str(text)}, **TEXT}},
            {"use": "prune", "with": {"layers": [1]}},
            {"use": "evaluate", "id": "before", "with": heldout},
            {"use": "quantize_llmcompressor", "with": {"to": f"o{number}", **options}},
            {"use": "evaluate", "with": heldout},
        ]
        result = gradmap("run", write_recipe(tmp_path, llama, *steps), "--json")
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout.splitlines()[-1])["summary"]["models"]
        before, after = (next(iter(row["metrics"].values()))["value"] for row in rows[1:])
        differences.append(abs(math.log(after / before)))
        model = load(tmp_path / f"o{number}")
        assert model.config.quantization_config.quant_method == "compressed-tensors"
        assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()
        assert gradmap("verify", f"o{number}").exit_code == 0
        assert json.loads((tmp_path / f"o{number}" / "gradmap.json").read_text())["layers_removed"] == [1]
    assert all(0 < difference < 0.3 for difference in differences), differences
    assert differences[2] < differences[0], "8 bits are closer than 4"
    assert len(list((tmp_path / ".gradmap" / "environments").glob("*/environment.json"))) == 1
