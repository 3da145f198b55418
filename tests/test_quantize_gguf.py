"""The stage around llama.cpp's quantiser; the quantiser itself is llama.cpp's. And how two files are compared."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.quantize_gguf import QuantizeGguf
from test_export_gguf import exporting, make_converter, plan
from tiny import make_model

from gradmap_pipeline import GgufFolder, OptionError, StageError
from gradmap_pipeline.errors import RecipeError
from gradmap_pipeline.exports import GgufForecast
from gradmap_pipeline.llamacpp import pythons
from gradmap_pipeline.llamacpp.parity import choose_lengths, compare_logits, make_prompts
from gradmap_pipeline.model.graph import open_folder
from gradmap_pipeline.testing import run_stage

HALVES = "open(target, 'wb').write(open(source, 'rb').read()[:8] + kind.encode())"


@pytest.fixture
def source(tmp_path: Path) -> GgufFolder:
    from gradmap_plugins.export_gguf import ExportGguf

    graph = open_folder(make_model(tmp_path / "model")).without_layers([1])
    action = 'open(options["--outfile"], "wb").write(b"GGUF" + b"0" * 100)'
    stage = ExportGguf(to=tmp_path / "plain", converter=make_converter(tmp_path, action))
    exported: GgufFolder = run_stage(stage, tmp_path / "export", model=graph).exported
    return exported


def make_program(folder: Path, action: str) -> Path:
    file = folder / "llama-quantize"
    file.write_text(f"#!{sys.executable}\nimport sys\nsource, target, kind, threads = sys.argv[1:]\n{action}\n")
    file.chmod(0o755)
    return file


def test_the_program_gets_file_and_type(source: GgufFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pythons, "_ask", lambda _, modules, folders: list(modules))
    stage = QuantizeGguf(to=tmp_path / "out", type="q5_k_m", program=make_program(tmp_path, HALVES))
    made = run_stage(stage, tmp_path / "step", exported=source)
    assert (tmp_path / "out" / "model-q5_k_m.gguf").read_bytes() == b"GGUF0000Q5_K_M"
    assert made.agreement is None
    assert made.exported.label == "pruned, GGUF q5_k_m"
    assert made.exported.count_bytes() == 14
    lineage = json.loads((tmp_path / "out" / "gradmap.json").read_text())
    assert lineage["llama_cpp"] is None
    assert [step["stage"] for step in lineage["steps"]] == ["quantize_gguf"]
    with pytest.raises(OptionError, match=r"quantised already \(q5_k_m\); quantise one of type f32 or f16 or bf16"):
        run_stage(stage.model_copy(update={"to": tmp_path / "again"}), tmp_path / "step2", exported=made.exported)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("sys.exit('no such type')", "quantiser ended with code 1: no such type"),
        ("pass", "quantiser ended without an error, and without a file; nothing was written"),
    ],
)
def test_a_program_that_fails(
    action: str, message: str, source: GgufFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageError, match=message):
        run_stage(QuantizeGguf(to=tmp_path / "out", program=make_program(tmp_path, action)), tmp_path / "s", exported=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        (
            {},
            "program",
            "is not on the search path for programs, and '.*' lacks llama-cpp-python, .* -m pip install llama-cpp-python",
        ),
        ({"program": "nowhere"}, "program", "there is no file 'nowhere'"),
        ({"program": "my notes"}, "program", r"'my notes' may not be started: chmod \+x 'my notes'"),
        ({"python": "nowhere"}, "python", "there is no file 'nowhere'"),
        (
            {"program": sys.executable, "min_agreement": 0.5},
            "min_agreement",
            "nothing runs the file, as '.*' lacks llama-cpp-python",
        ),
        ({"program": sys.executable}, "type", r"the file is quantised already \(q8_0\)"),
    ],
)
def test_the_plan_refuses(
    options: dict[str, Any], option: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my notes").write_text("quantise")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pythons, "_ask", lambda _, modules, folders: list(modules))
    with pytest.raises(OptionError, match=message) as caught:
        QuantizeGguf.model_validate({"to": tmp_path / "out", **options}).forecast({"exported": GgufForecast(type="q8_0")})
    assert caught.value.option == option


def test_the_plan_knows_the_type(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    quantising = {"use": "quantize_gguf", "with": {"to": str(tmp_path / "q"), "program": str(make_program(tmp_path, HALVES))}}
    made = plan(tmp_path, model, [exporting(tmp_path), quantising])
    assert made.steps[0].forecasts["exported"].type == "f16"
    assert made.steps[1].forecasts["exported"].type == "q4_k_m"
    with pytest.raises(RecipeError, match=r"quantised already \(q8_0\)"):
        plan(tmp_path, model, [exporting(tmp_path, type="q8_0"), quantising])


@pytest.mark.parametrize(
    ("window", "positions", "ignored", "lengths"),
    [
        (None, None, None, (12, 100, 500)),
        (512, 32768, None, (12, 100, 500, 552)),
        (128, 32768, None, (12, 100, 500)),
        (4096, 32768, None, (12, 100, 500)),
        (None, 64, None, (12, 64)),
        (64, 1024, 64, (12, 64)),
        (None, 8, None, ()),
    ],
)
def test_prompts_go_beyond_a_window(
    window: int | None, positions: int | None, ignored: int | None, lengths: tuple[int, ...]
) -> None:
    assert choose_lengths(window, positions, ignored) == lengths


@pytest.mark.parametrize(
    ("positions", "window", "message"),
    [
        (128, 4, "llama.cpp computes another model beyond the window of 4 tokens, and 9 tokens are needed to run it"),
        (8, None, "the model has 8 positions, and 9 tokens are needed to run it"),
    ],
)
def test_a_model_that_is_too_short(
    positions: int, window: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "mistral", "max_position_embeddings": positions, "sliding_window": window}
    monkeypatch.setattr("gradmap_pipeline.model.architecture.full_config", lambda _: config)
    with pytest.raises(StageError, match=message):
        make_prompts(open_folder(make_model(tmp_path / "model")), 32, 0)


def test_logits_are_compared_over_tokens_that_both_know() -> None:
    meant = torch.tensor([[[1.0, 3.0, 2.0], [4.0, 0.0, 1.0]]])
    found = torch.tensor([[[1.0, 3.0], [4.0, 0.5]]])
    parity = compare_logits(meant, found, (12,))
    assert parity.difference == 0.5
    assert parity.agreeing == 1.0
    assert parity.lost == 0.0
    expected = math.log1p(math.exp(-3.5)) - math.log1p(math.exp(-4.0))
    assert parity.log_probability_difference == pytest.approx(expected, rel=1e-5)
    padded = torch.cat([meant, torch.tensor([[[9.0], [0.0]]])], dim=-1)
    parity = compare_logits(meant, padded, (12,))
    assert (parity.difference, parity.agreeing, parity.lost) == (0.0, 0.5, 0.0)


def test_another_choice_loses_probability() -> None:
    meant = torch.tensor([[[1.0, 3.0]]])
    parity = compare_logits(meant, torch.tensor([[[3.0, 1.0]]]), (12,))
    assert parity.agreeing == 0.0
    assert parity.lost == pytest.approx(2.0)
    with pytest.raises(StageError, match=r"with a prompt of 12 tokens, logits differ by 2 \(accepted: 0.3\); nothing was written"):
        compare_logits(meant, torch.tensor([[[3.0, 1.0]]]), (12,), 0.1)
    with pytest.raises(StageError, match="logits differ by nan"):
        compare_logits(meant, torch.tensor([[[math.nan, 1.0]]]), (12,), 0.1)
