"""Prune, export, quantise, evaluate in one recipe; and what is refused in which order."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.export import ExportModel
from gradmap_plugins.quantize_torchao import QuantizeTorchao
from tiny import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.older import with_older_rope
from gradmap_pipeline.cli import app
from gradmap_pipeline.testing import run_stage

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent
onnx_libraries = pytest.mark.skipif(sys.version_info < (3, 11), reason="the exporter of transformers asks for Python 3.11")


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.slow
@onnx_libraries
def test_prune_quantize_onnx_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table with perplexity and bytes at each point, all on the same text."""
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "recipes" / "prune-quantize-onnx.yaml"
    code, output = invoke("run", str(recipe), "--store", str(tmp_path / "store"), "--json")
    assert code == 0, output
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    rows = {row["label"]: row for row in events[-1]["summary"]["models"]}
    assert list(rows) == ["dense", "pruned", "compensated", "compensated, ONNX", "compensated, ONNX int8"]
    perplexity = {label: row["metrics"]["perplexity on builtin heldout"]["value"] for label, row in rows.items()}
    own = {"agreement on builtin heldout", "perplexity_ratio on builtin heldout"}
    assert [set(row["metrics"]) - {"perplexity on builtin heldout"} for row in rows.values()] == [set(), set(), set(), set(), own]
    assert perplexity["dense"] < perplexity["compensated"] < perplexity["pruned"]
    assert perplexity["compensated, ONNX"] == pytest.approx(perplexity["compensated"], rel=1e-4)
    assert perplexity["compensated, ONNX int8"] == pytest.approx(perplexity["compensated"], rel=0.02)
    assert rows["compensated, ONNX int8"]["bytes"] < 0.6 * rows["compensated, ONNX"]["bytes"]
    for folder in ("docs-llama-onnx", "docs-llama-onnx-int8"):
        code, output = invoke("verify", str(tmp_path / "out" / folder))
        assert code == 0, output
        assert "ONNX Runtime loads and runs it" in output
    steps = json.loads((tmp_path / "out" / "docs-llama-onnx-int8" / "gradmap.json").read_text())["steps"]
    order = ["calibrate", "gradmap_score", "prune", "project_compensate", "evaluate", "export", "evaluate_onnx", "quantize_onnx"]
    assert [step["id"] for step in steps] == order
    assert (steps[5]["options"]["format"], steps[7]["options"]["method"]) == ("onnx", "int8")


def write_recipe(folder: Path, *steps: dict[str, Any]) -> str:
    (folder / "recipe.yaml").write_text(json.dumps({"version": 1, "model": {"builtin": "docs-llama"}, "steps": list(steps)}))
    return str(folder / "recipe.yaml")


ONNX = [{"use": "export", "with": {"format": "onnx", "to": "a"}}]
HELDOUT = {"dataset": {"builtin": "heldout"}, "samples": 4, "sequence_length": 64}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"use": "quantize_torchao", "with": {"to": "a"}}, {"use": "prune", "with": {"layers": [1]}}],
            "step 'prune' takes a ModelGraph as 'model', but after step 'quantize_torchao' it is a TransformersFolder; put",
        ),
        (
            [
                {"use": "calibrate", "with": HELDOUT},
                {"use": "quantize_torchao", "with": {"to": "a"}},
                {"use": "gradmap_score"},
            ],
            "step 'gradmap_score' takes a ModelGraph as 'model', but after step 'quantize_torchao' it is a TransformersFolder",
        ),
        (
            [{"use": "quantize_torchao", "with": {"to": "a"}}, {"use": "export", "with": {"format": "onnx", "to": "b"}}],
            "step 'export' takes an ExportableModel as 'model', but after step 'quantize_torchao' it is a TransformersFolder",
        ),
        (
            [{"use": "export", "with": {"to": "a"}}, {"use": "quantize_onnx", "with": {"to": "b"}}],
            "step 'quantize_onnx' takes an OnnxFolder as 'exported', but after step 'export' it is a TransformersFolder",
        ),
        (
            [
                {"use": "calibrate", "with": HELDOUT},
                {"use": "evaluate", "from": {"model": "calibrate.calibration"}, "with": HELDOUT},
            ],
            "input 'model' takes a Model, but 'calibrate.calibration' is a CalibrationSet",
        ),
        ([{"use": "quantize_onnx", "with": {"to": "b"}}], "step 'quantize_onnx' needs an input 'exported' (OnnxFolder)"),
        (
            [*ONNX, {"use": "quantize_onnx", "with": {"to": "b", "sequence_length": 100_000}}],
            "option 'sequence_length': found 100000, but the model is made for 512 tokens; accepted: 2 to 512",
        ),
        (
            [*ONNX, {"use": "quantize_onnx", "with": {"to": "b"}}, {"use": "quantize_onnx", "id": "again", "with": {"to": "c"}}],
            "step 'again': option 'method': the graph is quantised already (int4); quantise the export it was made from",
        ),
        (
            [*ONNX, {"use": "evaluate", "from": {"model": "export.exported"}, "with": {**HELDOUT, "sequence_length": 100_000}}],
            "option 'sequence_length': found 100000, but the model is made for 512 tokens; accepted: 2 to 512",
        ),
    ],
)
@onnx_libraries
def test_wrong_order_is_found_by_kind(steps: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    code, output = invoke("check", write_recipe(tmp_path, *steps))
    assert code == 2
    assert message in output


def test_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmap_pipeline.machine import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("torchao", "onnxscript") else object())
    recipe = write_recipe(
        tmp_path,
        {"use": "export", "with": {"format": "onnx", "to": "b"}},
        {"use": "quantize_torchao", "with": {"to": "a"}},
    )
    code, output = invoke("check", recipe)
    assert code == 2
    assert "needs onnxscript, which is not installed: pip install 'gradmap-pipeline[onnx]'" in output
    assert "step 'quantize_torchao' needs torchao, which is not installed: pip install 'gradmap-pipeline[torchao]'" in output


@pytest.mark.parametrize("method", ["int8", "int8_dynamic"])
def test_torchao_folder_loads_and_is_evaluated(method: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("accelerate")
    recipe = write_recipe(
        tmp_path,
        {"use": "prune", "with": {"layers": [3]}},
        {"use": "evaluate", "id": "before", "with": HELDOUT},
        {"use": "quantize_torchao", "id": "smaller", "with": {"method": method, "to": str(tmp_path / "small")}},
        {"use": "evaluate", "with": HELDOUT},
    )
    code, output = invoke("run", recipe, "--store", str(tmp_path / "store"), "--json")
    assert code == 0, output
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    before, after = (row["metrics"] for row in events[-1]["summary"]["models"][1:])
    name = next(iter(before))
    assert 0 < abs(math.log(after[name]["value"] / before[name]["value"])) < 0.02
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert "Int8" in type(model.model.layers[0].mlp.down_proj.weight).__name__
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()
    assert invoke("verify", str(tmp_path / "small"))[0] == 0
    steps = json.loads((tmp_path / "small" / "gradmap.json").read_text())["steps"]
    made_by = [("prune", "prune"), ("before", "evaluate"), ("smaller", "quantize_torchao")]
    assert [(step["id"], step["stage"]) for step in steps] == made_by
    assert steps[-1]["options"]["method"] == method


def test_torchao_will_not_write_over_its_model(tmp_path: Path) -> None:
    from gradmap_pipeline.errors import StageError

    folder = make_model(tmp_path / "model")
    with pytest.raises(StageError, match="which is being read; write to another folder"):
        run_stage(QuantizeTorchao(to=folder, overwrite=True), tmp_path / "step", model=open_folder(folder))


def export_llama(folder: Path, **changes: Any) -> Path:
    graph = open_folder(make_model(folder / "model", **changes))
    run_stage(ExportModel(to=folder / "out"), folder / "export", model=graph.without_layers([1]))
    return folder / "out"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json has 2 bytes, not "),
        (
            lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text().replace("silu", "gelu")),
            "config.json has been changed since it was written",
        ),
        (
            lambda folder: (folder / "gradmap.json").write_text("{}"),
            "is damaged: it is not what was written when the folder was exported",
        ),
        (
            lambda folder: (folder / "gradmap.json").unlink(),
            "is not an export: gradmap.json cannot be read (No such file or directory)",
        ),
    ],
)
def test_verify_notices_what_changed(spoil: Any, message: str, tmp_path: Path) -> None:
    folder = export_llama(tmp_path)
    code, output = invoke("verify", str(folder))
    assert code == 0
    assert "transformers loads it, with no weight missing or left over" in output
    (folder / "notes.txt").touch()
    assert "besides, not part of the export: notes.txt" in invoke("verify", str(folder))[1]
    spoil(folder)
    code, output = invoke("verify", str(folder))
    assert code == 4
    assert message in output


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
        (
            {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_older_rope_fields(parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    assert with_older_rope({"a": 1, "rope_parameters": parameters}) == {"a": 1, "rope_parameters": parameters, **expected}
    assert with_older_rope({"a": 1}) == {"a": 1}
    assert with_older_rope({"text_config": {"rope_parameters": parameters}})["text_config"].keys() >= expected.keys()


@pytest.mark.slow
def test_transformers_4_computes_the_same(tmp_path: Path) -> None:
    """In an environment of its own, with torch from here; a base frequency other than the default is where it went wrong."""
    scaling = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    folder = export_llama(tmp_path, rope_parameters=scaling)
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 5e5
    make_tokenizer(folder)
    ids = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    torch.save({"ids": ids, "logits": expected.detach()}, tmp_path / "expected.pt")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "transformers==4.57.6"], check=True)
    here = Path(torch.__file__).parent.parent
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "torch-from-there.pth").write_text(f"{here}\n")
    code = (
        "import sys, torch, transformers; from transformers import AutoModelForCausalLM\n"
        "assert transformers.__version__ == '4.57.6', transformers.__version__\n"
        "saved = torch.load(sys.argv[2]); model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "print(float((model(input_ids=saved['ids']).logits - saved['logits']).abs().max()))"
    )
    done = subprocess.run([python, "-c", code, folder, tmp_path / "expected.pt"], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) <= 1e-5
    shutil.rmtree(environment)
