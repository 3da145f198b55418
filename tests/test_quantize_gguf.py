"""The stage around llama.cpp's quantiser; the quantiser itself is llama.cpp's. And how two files are compared."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.export_gguf import ExportGguf
from gradmap_plugins.quantize_gguf import QuantizeGguf
from pydantic import ValidationError
from test_export_gguf import exporting, make_converter, plan
from tiny import make_model
from typer.testing import CliRunner

from gradmap_pipeline import DatasetSource, Forecasts, GgufFolder, Metric, OptionError, QualityError, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.data import load_tokenizer, make_sequences
from gradmap_pipeline.errors import RecipeError
from gradmap_pipeline.export.exports import GgufForecast
from gradmap_pipeline.export.llamacpp import pythons
from gradmap_pipeline.export.llamacpp.parity import choose_lengths, compare_logits, make_prompts
from gradmap_pipeline.testing import make_context, run_stage

HALVES = "open(target, 'wb').write(open(source, 'rb').read()[:8] + kind.encode())"


@pytest.fixture
def source(tmp_path: Path) -> GgufFolder:
    graph = open_folder(make_model(tmp_path / "model")).without_layers([1])
    action = 'open(options["--outfile"], "wb").write(b"GGUF" + b"0" * 100)'
    stage = ExportGguf(to=tmp_path / "plain", converter=make_converter(tmp_path, action))
    exported: GgufFolder = run_stage(stage, tmp_path / "export", model=graph).exported
    return exported


RUNNER = """
import json, sys
import numpy as np
kind = open(sys.argv[1], "rb").read()[8:]
print(json.dumps({"words": 259}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    prompts = request["prompts"] if request["every"] else [prompt[-1 - request["steps"]:] for prompt in request["prompts"]]
    ids = np.array(prompts)
    likeliest = (ids + 1 + (kind == b"Q4_K_M") * (ids % 2)) % 259
    logits = np.zeros((*ids.shape, 259), np.float32)
    np.put_along_axis(logits, likeliest[..., None], 6.0, -1)
    np.save(request["out"], logits)
    print("{}", flush=True)
"""
"""Finds the next id likeliest; of a file that HALVES made, after an odd id the one after that."""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of llama.cpp."""
    file = tmp_path / "runner.py"
    file.write_text(RUNNER)
    monkeypatch.setattr(pythons, "_ask", lambda _, modules, folders: [])
    monkeypatch.setattr("gradmap_pipeline.export.llamacpp.session.RUNNER", file)
    return file


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
    assert made.exported.size_bytes == 14
    lineage = json.loads((tmp_path / "out" / "gradmap.json").read_text())
    assert lineage["llama_cpp"] is None
    assert [step["stage"] for step in lineage["steps"]] == ["quantize_gguf"]
    with pytest.raises(OptionError, match=r"quantised already \(q5_k_m\); quantise one of type f32 or f16 or bf16"):
        run_stage(stage.model_copy(update={"to": tmp_path / "again"}), tmp_path / "step2", exported=made.exported)


def quantise(source: GgufFolder, tmp_path: Path, metrics: Sequence[Metric] = (), **options: Any) -> tuple[Any, list[str]]:
    """With the stand-in for the program; outputs and notes."""
    notes: list[str] = []
    given = {"to": tmp_path / "out", "program": make_program(tmp_path, HALVES), **options}
    stage = QuantizeGguf.model_validate(given)
    context = make_context(tmp_path / "step", notes=notes, metrics=metrics)
    return stage.run(stage.Inputs(exported=source), context), notes


def test_what_it_costs_on_a_text(source: GgufFolder, runner: Path, tmp_path: Path) -> None:
    text = {"dataset": {"builtin": "heldout"}, "samples": 5, "sequence_length": 40}
    made, notes = quantise(source, tmp_path, **text)
    ids, _ = make_sequences(load_tokenizer(source.graph.base), DatasetSource(builtin="heldout").documents(), 40, 5)
    before, after = ids[:, :-1].flatten(), ids[:, 1:].flatten()
    odd = before % 2
    total = math.log(math.exp(6.0) + 258)
    base = math.exp(total - 6.0 * float((after == (before + 1) % 259).double().mean()))
    perplexity = math.exp(total - 6.0 * float((after == (before + 1 + odd) % 259).double().mean()))
    assert made.agreement is None
    assert made.on_text.tokens == 5 * 39
    assert made.on_text.agreement == pytest.approx(float((odd == 0).double().mean()))
    assert made.on_text.base_perplexity == pytest.approx(base, rel=1e-5)
    assert made.on_text.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert made.exported.max_logit_difference == 6.0
    metrics = {metric.title: metric.value for metric in made.on_text.list_metrics()}
    assert metrics["agreement on builtin heldout"] == made.on_text.agreement
    assert metrics["perplexity_ratio on builtin heldout"] == pytest.approx(perplexity / base, rel=1e-5)
    assert made.on_text.model == made.exported.digest
    told = f"{made.on_text}, logits differ by up to 6"
    assert notes == [f"wrote {tmp_path / 'out'}: 0.0 MB of files, {told}"]
    assert f"on 195 tokens of builtin heldout: perplexity {perplexity:.4g} instead of {base:.4g} (" in told
    lineage = json.loads((tmp_path / "out" / "gradmap.json").read_text())
    assert lineage["llama_cpp"]["agreement"] == made.on_text.agreement
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Weights quantised: Q4_K_M.\n- made from a file of type F16\n- {made.on_text}\n- logits differ by up to 6\n" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_agreement": 0.9}, r"both choose the same next token for 0\.\d+ of the tokens of 'builtin heldout', under min_agr"),
        ({"max_perplexity_ratio": 0.5}, r"perplexity on 'builtin heldout' is \d\.\d+ times that before .*, over max_perplexity_r"),
        (
            {"dataset": None, "min_agreement": 0.9},
            r"q4_k_m finds the same token likeliest at 0\.\d+ of positions of random prompts",
        ),
    ],
)
def test_limits(options: dict[str, Any], message: str, source: GgufFolder, runner: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=f"{message}.*; choose a type of more bits, or change the limit; nothing was written"):
        quantise(source, tmp_path, **{"dataset": {"builtin": "heldout"}, **options})
    assert not (tmp_path / "out").exists()


def test_without_a_text_the_note_names_random_prompts(source: GgufFolder, runner: Path, tmp_path: Path) -> None:
    made, notes = quantise(source, tmp_path)
    share = made.agreement.agreeing
    assert 0.2 < share < 0.8
    told = f"at 18 positions of random prompts, {share:.0%} of likeliest tokens are those of the file before quantisation"
    assert notes == [f"wrote {tmp_path / 'out'}: 0.0 MB of files, {told}, logits differ by up to 6"]
    assert made.on_text is None
    (metric,) = made.agreement.list_metrics()
    assert (metric.title, metric.value, metric.setting) == ("agreement on random prompts", share, "18 positions")
    assert made.agreement.model == made.exported.digest


def test_the_card_is_of_the_quantised_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pythons, "_ask", lambda _, modules, folders: list(modules))
    base = make_model(tmp_path / "model")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    graph = open_folder(base).without_layers([1])
    hub = graph.model_copy(update={"base": graph.base.model_copy(update={"from_hub": True, "name": "owner/name"})})
    metric = Metric(name="perplexity", value=40.0, better="lower", on="text", model=hub.digest)
    action = 'open(options["--outfile"], "wb").write(b"GGUF" + b"0" * 100)'
    stage = ExportGguf(to=tmp_path / "plain", converter=make_converter(tmp_path, action))
    exported = run_stage(stage, tmp_path / "export", model=hub, metrics=[metric]).exported
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert "base_model_relation: finetune" in plain
    assert "| metric | on | this model | better |" in plain
    quantise(exported, tmp_path, metrics=[metric])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: owner/name\nbase_model_relation: quantized\n" in card
    assert "\nlicense: mit\n" in card
    assert "# owner/name, 3 of 4 layers, Q4_K_M\n" in card
    assert " 14 bytes in `model-q4_k_m.gguf`." in card
    assert "llama-cli -m model-q4_k_m.gguf" in card
    assert "| metric | on | this model before quantisation | better |" in card
    assert "| perplexity | text | 40.000 | lower |" in card
    assert "model-f16" not in card


@pytest.mark.parametrize("option", ["samples", "sequence_length", "max_perplexity_ratio"])
def test_options_of_a_text(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=f"'{option}' belongs to 'dataset', which is not set"):
        QuantizeGguf.model_validate({"to": tmp_path / "out", option: 2})


def test_every_step_is_in_the_lineage(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    program = str(make_program(tmp_path, HALVES))
    text = {"builtin": "calibration"}
    steps = [
        {"use": "calibrate", "with": {"dataset": text, "samples": 2, "sequence_length": 16}},
        {"use": "shortgpt_score", "id": "scores"},
        {"use": "prune", "with": {"layers": 1}},
        exporting(tmp_path, 'open(options["--outfile"], "wb").write(b"GGUF0000")'),
        {"use": "quantize_gguf", "id": "small", "with": {"to": str(tmp_path / "q"), "program": program}},
    ]
    steps[3]["id"] = "file"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": steps}))
    result = CliRunner().invoke(app, ["run", str(recipe), "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    for folder, ids in (
        ("out", ["calibrate", "scores", "prune", "file"]),
        ("q", ["calibrate", "scores", "prune", "file", "small"]),
    ):
        written = json.loads((tmp_path / folder / "gradmap.json").read_text())["steps"]
        assert [step["id"] for step in written] == ids
        assert "to" not in written[-1]["options"]  # a place on this machine
    assert [step["stage"] for step in written][-2:] == ["export_gguf", "quantize_gguf"]


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
        (
            {"program": sys.executable, "dataset": {"builtin": "heldout"}},
            "dataset",
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
        QuantizeGguf.model_validate({"to": tmp_path / "out", **options}).forecast(
            Forecasts(QuantizeGguf, exported=GgufForecast(type="q8_0"))
        )
    assert caught.value.option == option


def test_the_plan_knows_how_long_sequences_may_be(runner: Path, tmp_path: Path) -> None:
    options = {"to": tmp_path / "out", "program": make_program(tmp_path, HALVES), "dataset": {"builtin": "heldout"}}
    source = GgufForecast(type="f16", layers=3, positions=128)
    with pytest.raises(OptionError, match="found 129, but the model is made for 128 tokens; accepted: 2 to 128"):
        QuantizeGguf.model_validate({**options, "sequence_length": 129}).forecast(Forecasts(QuantizeGguf, exported=source))
    with pytest.raises(OptionError, match=r"\d samples of 128 tokens are more than the"):
        QuantizeGguf.model_validate({**options, "samples": 10**9}).forecast(Forecasts(QuantizeGguf, exported=source))


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
    monkeypatch.setattr("gradmap_pipeline.checkpoint.architecture.full_config", lambda _: config)
    with pytest.raises(StageError, match=message):
        make_prompts(open_folder(make_model(tmp_path / "model")), 32, 0)


def test_logits_are_compared_over_tokens_that_both_know() -> None:
    meant = torch.tensor([[[1.0, 3.0, 2.0], [4.0, 0.0, 1.0]]])
    computed = torch.tensor([[[1.0, 3.0], [4.0, 0.5]]])
    parity = compare_logits(meant, computed, (12,))
    assert parity.difference == 0.5
    told = "run by llama.cpp at 12 tokens of random prompts, logits differ by up to 0.5, 100% of likeliest tokens agree"
    assert str(parity) == told
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
