"""Stages look at the model before any step runs, and a refusal leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from walk import make_model

from gradmap_pipeline import ModelError
from gradmap_pipeline.batches import Batch
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.sweep.layerwise import LayerwiseModel


def run(command: str, folder: Path, text: Path, architecture: str, *settings: str, **changes: Any) -> tuple[int, str]:
    """A whole recipe on a small model: exit code, and what was printed."""
    if not (folder / "model").exists():
        make_model(folder / "model", architecture, **changes)
    data = {"dataset": {"path": str(text)}, "samples": 4, "sequence_length": 16}
    steps = [
        {"use": "calibrate", "with": data},
        {"use": "gradmap_score"},
        {"use": "prune", "with": {"layers": 3}},
        {"use": "project_compensate"},
        {"use": "export", "with": {"to": str(folder / "out")}},
    ]
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": {"path": str(folder / "model")}, "steps": steps}))
    options = [part for setting in settings for part in ("--set", setting)]
    store = [] if command == "check" else ["--store", str(folder / "store")]
    result = CliRunner().invoke(app, [command, str(recipe), *store, *options])
    return result.exit_code, result.output


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("minimax", "step 'project_compensate': a correction cannot be folded into any layer"),
        ("diffllama", "step 'prune': layer 4 would be another layer at place 3 of the pruned model: 'lambda_init' of 'self_attn'"),
        ("deepseek_v4", "step 'gradmap_score': DeepseekV4ForCausalLM cannot be run layer by layer: its hidden states have shape"),
    ],
)
def test_a_refusal_comes_before_any_step(command: str, architecture: str, message: str, text: Path, tmp_path: Path) -> None:
    code, output = run(command, tmp_path, text, architecture, "gradmap_score.layers=3")
    assert code == 2
    assert message in output
    assert "done" not in output
    assert not (tmp_path / "out").exists()


def test_cadence_is_named_by_check_and_kept_by_run(text: Path, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 12, "attn_layer_period": 4, "attn_layer_offset": 2}
    code, output = run("check", tmp_path, text, "jamba", "gradmap_score.layers=3", **changes)
    assert code == 2
    assert "set `among: expressible` to choose only among those that do not; possible, for instance: remove 1, 5, 9" in output
    settings = ("gradmap_score.layers=3", "prune.among=expressible")
    assert run("check", tmp_path, text, "jamba", *settings)[0] == 0
    code, output = run("run", tmp_path, text, "jamba", *settings)
    assert code == 0, output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 9


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "is already quantised (fp8); prune the original model first, then quantise",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "is already quantised (awq)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "is already quantised (compressed-tensors)"),
        ({"is_encoder_decoder": True, "model_type": "t5"}, "is an encoder-decoder model (t5)"),
    ],
)
def test_config_alone_refuses(written: dict[str, Any], message: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4, **written}))
    code, output = run("check", tmp_path, text, "llama")
    assert code == 2
    assert message in output


def test_hub_model_is_refused_before_its_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from gradmap_pipeline.checkpoint.source import ModelSource
    from gradmap_pipeline.errors import ModelError

    def fetch_config(name: str, file: str, revision: str | None = None) -> str:
        assert (name, file, revision) == ("someone/model-gptq", "config.json", None)
        (tmp_path / file).write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch_config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("weights were fetched"))
    with pytest.raises(ModelError, match=r"'someone/model-gptq' is already quantised \(gptq\)"):
        ModelSource(id="someone/model-gptq").fetch_folder()


def run_a_layer(model: LayerwiseModel) -> None:
    hidden, arguments = model.record(Batch(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.bool)))
    with model.layer(0):
        model.try_layer(0, hidden, arguments[0])


def test_an_error_of_the_architecture_refuses_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its code, in a library below it, and at the call."""
    for wrong in (lambda *_: int("x"), lambda: None):
        model = LayerwiseModel(open_folder(llama))
        monkeypatch.setattr(type(model._layers[0].mlp), "forward", _as_of("transformers.models.llama", wrong))
        with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be run layer by layer: (ValueError|TypeError)"):
            run_a_layer(model)


def test_an_error_of_ours_is_not_the_architecture(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LayerwiseModel(open_folder(llama))
    monkeypatch.setattr(type(model._layers[0].mlp), "forward", _as_of("gradmap_pipeline.sweep.somewhere", lambda *_: int("x")))
    with pytest.raises(ValueError, match="invalid literal for int"):
        run_a_layer(model)


def _as_of(module: str, function: Any) -> Any:
    """A function as if it stood in another module."""
    return FunctionType(function.__code__, {**globals(), "__name__": module}, function.__name__)
