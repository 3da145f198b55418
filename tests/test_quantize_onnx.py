"""Quantised graphs: all that has a quantised form is in it, what is left is named, and what it costs is measured and limited."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.quantize_onnx import QuantizeOnnx
from test_onnx import export, make_pruned

from gradmap_pipeline import CalibrationSet, Forecasts, OnnxFolder, OptionError, QualityError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
from gradmap_pipeline.cli import app
from gradmap_pipeline.export.agreement import compare_models, cut_batches
from gradmap_pipeline.export.decoders import open_decoder
from gradmap_pipeline.export.ort.inputs import collect_squares, make_groups
from gradmap_pipeline.export.ort.layout import find_graph
from gradmap_pipeline.export.ort.matrices import find_matrices
from gradmap_pipeline.export.ort.session import OnnxSession
from gradmap_pipeline.testing import run_stage

pytestmark = pytest.mark.full

TEXT = {"samples": 4, "sequence_length": 64}


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> OnnxFolder:
    return export(open_folder(BUILTIN_FOLDER), tmp_path_factory.mktemp("builtin"))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    stage = Calibrate.model_validate({"dataset": {"builtin": "calibration"}, "samples": 16, "sequence_length": 128})
    calibration_set = run_stage(stage, tmp_path_factory.mktemp("calibrate"), model=open_folder(BUILTIN_FOLDER)).calibration
    assert isinstance(calibration_set, CalibrationSet)
    return calibration_set


def test_onnx_runtime_decodes_as_transformers_does(builtin: OnnxFolder) -> None:
    prompts = torch.randint(400, (2, 12), generator=torch.Generator().manual_seed(2))
    said = []
    for model in (builtin, builtin.graph):
        with open_decoder(model, "float32", "cpu") as decoder:
            done = decoder.decode(prompts, 8)
        assert done.prefill > 0
        assert done.decode > 0
        said.append(done.ids.tolist())
    assert said[0] == said[1]


def quantise(exported: OnnxFolder, folder: Path, calibration: CalibrationSet | None = None, **options: Any) -> Any:
    given = {} if calibration is None else {"calibration": calibration}
    stage = QuantizeOnnx.model_validate({"to": folder / "small", **TEXT, **options})
    return run_stage(stage, folder / "quantise", exported=exported, **given)


@pytest.mark.parametrize(
    ("architecture", "method", "most", "left"),
    [
        ("llama", "int8", 0.02, set()),
        pytest.param("gpt2", "int4", 0.5, {(128, 32)}, marks=pytest.mark.slow),
        pytest.param("gpt2", "int8_dynamic", 0.1, {(128, 32)}, marks=pytest.mark.slow),
        ("llama", "int4", 0.5, set()),
        ("gemma3_text", "int8", 0.05, set()),
    ],
)
def test_every_matrix_is_quantised(architecture: str, method: str, most: float, left: set[Any], tmp_path: Path) -> None:
    """GPT-2's products are Gemm, its head is the transposed table of embeddings, and its table of positions stays."""
    exported = export(make_pruned(tmp_path, architecture), tmp_path)
    result = quantise(exported, tmp_path, method=method)
    products = {"llama": 7, "gpt2": 4, "gemma3_text": 7}[architecture]
    tables = {"llama": 2, "gpt2": 1, "gemma3_text": 1}[architecture]  # the head is one of them, or tied to the other
    assert result.matrices.quantised == 4 * products + tables
    model = onnx.load(find_graph(result.exported.folder))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert {shapes[name] for name in result.matrices.left} == left
    assert all(count == np.prod(shapes[name]) for name, count in result.matrices.left.items())
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("GatherBlockQuantized") == 1
    assert not {"Gemm"} & set(kinds)
    assert 0 < result.exported.max_logit_difference < most * 3
    assert result.exported.label == f"pruned, ONNX {method}"
    assert result.exported.size_bytes < 0.75 * exported.size_bytes
    lineage = json.loads((tmp_path / "small" / "gradmap.json").read_text())
    assert lineage["steps"][-1]["options"]["method"] == method
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"Weights quantised: {method}.\n- {result.matrices.quantised} matrices quantised" in card
    assert f"{result.exported.size_bytes:,} bytes in `model.onnx`, `model.onnx_data`." in card
    with pytest.raises(OptionError, match=f"is quantised already \\({method}\\); quantise the export it was made from"):
        run_stage(QuantizeOnnx(to=tmp_path / "again"), tmp_path / "again-work", exported=result.exported)


def test_a_tied_head_keeps_one_copy(builtin: OnnxFolder, tmp_path: Path) -> None:
    """Product and table read the same bytes; the file is little more than 8 bits for each parameter."""
    result = quantise(builtin, tmp_path, method="int8")
    model = onnx.load(find_graph(result.exported.folder), load_external_data=False)
    (table,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    (reshape,) = (node for node in model.graph.node if node.output[0] == table.input[0])
    head = next(node for node in model.graph.node if node.op_type == "MatMulNBits" and node.input[1] == reshape.input[0])
    assert head.output[0] == "logits"
    assert (table.input[2], table.input[3]) == (head.input[2], head.input[3])
    weights = (result.exported.folder / "model.onnx_data").stat().st_size
    assert weights < 1.2 * builtin.graph.count_parameters()


@pytest.mark.slow
def test_half_precision_is_quantised(tmp_path: Path) -> None:
    exported = export(make_pruned(tmp_path, "llama"), tmp_path, onnx={"dtype": "float16"})
    result = quantise(exported, tmp_path, method="int8")
    assert result.exported.label == "pruned, ONNX fp16 int8"
    assert result.matrices.perplexity == pytest.approx(result.matrices.base_perplexity, rel=0.02)


def test_calibration_makes_4_bits_better(builtin: OnnxFolder, calibration: CalibrationSet, tmp_path: Path) -> None:
    """On text that it was not calibrated on; and 8 bits for some matrices make it better still, in as many bytes as allowed."""
    enough: dict[str, Any] = {"method": "int4", "samples": 24, "sequence_length": 128}
    plain = quantise(builtin, tmp_path / "plain", eight_bits=0, **enough)
    made_up = quantise(builtin, tmp_path / "gptq", calibration, eight_bits=0, **enough)
    mixed = quantise(builtin, tmp_path / "mixed", calibration, eight_bits=0.3, **enough)
    gaps = [np.log(agreement.matrices.perplexity / agreement.matrices.base_perplexity) for agreement in (plain, made_up, mixed)]
    assert 0 < gaps[1] < 0.75 * gaps[0]
    assert gaps[2] < gaps[1]
    assert plain.matrices.agreement < made_up.matrices.agreement
    assert plain.matrices.in_8_bits == made_up.matrices.in_8_bits == 0 < mixed.matrices.in_8_bits
    more = mixed.exported.size_bytes - made_up.exported.size_bytes
    assert 0 < more < 0.3 * builtin.graph.count_parameters() * 0.6


def test_squares_are_those_of_the_inputs(builtin: OnnxFolder, calibration: CalibrationSet, tmp_path: Path) -> None:
    """Of the head: sums over the final hidden states that transformers computes, without padding."""
    import onnx_ir
    from transformers import AutoModelForCausalLM

    ids, mask = (tensor[:3].clone() for tensor in calibration.load())
    mask[1, 50:] = 0
    model = onnx_ir.load(find_graph(builtin.folder))
    head = next(matrix for matrix in find_matrices(model) if matrix.tables and matrix.products)
    ((group, squares),) = collect_squares(model, [head], ids, mask, tmp_path, lambda: None)
    (measured,) = squares.values()
    torch_model = AutoModelForCausalLM.from_pretrained(BUILTIN_FOLDER, dtype=torch.float32)
    with torch.no_grad():
        hidden = torch_model.model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()].double()
    assert group == [head]
    torch.testing.assert_close(measured.double(), hidden.T @ hidden, rtol=1e-3, atol=0.1)
    assert model.graph.outputs[0].name == "logits"
    assert len(model.graph.outputs) == 1 + 2 * len(builtin.graph.layers)


def test_groups_bound_the_sums(builtin: OnnxFolder) -> None:
    import onnx_ir

    matrices = find_matrices(onnx_ir.load(find_graph(builtin.folder)))
    assert make_groups(matrices) == [matrices]
    small = make_groups(matrices, limit=4 * 192**2)
    assert len(small) > 12
    assert [matrix for group in small for matrix in group] == matrices


def test_agreement_by_formula(builtin: OnnxFolder, calibration: CalibrationSet, tmp_path: Path) -> None:
    """Perplexities and agreement in fp64, token by token, of a graph and its 4-bit form; padded columns do not count."""
    result = quantise(builtin, tmp_path, method="int4")
    ids, mask = (tensor[:2, :40].clone() for tensor in calibration.load())
    mask[1, 30:] = 0
    sessions = [OnnxSession(folder) for folder in (builtin.folder, result.exported.folder)]
    agreement = compare_models(*(session.compute for session in sessions), cut_batches(ids, mask, 2048))
    losses, chosen = ([], []), ([], [])
    for row, length in ((0, 40), (1, 30)):
        for which, session in enumerate(sessions):
            tokens = ids[row : row + 1, :length]
            logits = session.run(tokens, torch.ones_like(tokens), session.start(1))[0][0].double().numpy()
            for place in range(length - 1):
                shifted = logits[place] - logits[place].max()
                losses[which].append(np.log(np.exp(shifted).sum()) - shifted[tokens[0, place + 1]])
                chosen[which].append(int(logits[place].argmax()))
    assert agreement.tokens == 39 + 29 == len(losses[0])
    assert agreement.base_loss == pytest.approx(np.mean(losses[0]), rel=1e-5)
    assert agreement.loss == pytest.approx(np.mean(losses[1]), rel=1e-3)
    same = [one == other for one, other in zip(*chosen, strict=True)]
    assert agreement.agreement == pytest.approx(np.mean(same), abs=0.03)
    assert agreement.ratio == pytest.approx(np.exp(np.mean(losses[1]) - np.mean(losses[0])), rel=1e-3)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"max_perplexity_ratio": 1.0001},
            r"perplexity on 'builtin heldout' is 1\.\d+ times .*, over max_perplexity_ratio 1\.0001; keep more in 8 bits, put "
            "calibrate before this step, or change the limit; nothing was written",
        ),
        ({"min_agreement": 0.999}, r"choose the same next token for 0\.\d+ of the tokens of .*, under min_agreement 0\.999"),
    ],
)
def test_limits(limits: dict[str, float], message: str, builtin: OnnxFolder, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=message):
        quantise(builtin, tmp_path, method="int4", **limits)
    assert not (tmp_path / "small").exists()
    result = quantise(builtin, tmp_path, method="int8", max_perplexity_ratio=1.05, min_agreement=0.5)
    assert result.matrices.tokens == 4 * 63


def test_what_it_costs_is_shown_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the step's note are those of the table, also where they end the run; the folder is there then."""
    monkeypatch.chdir(tmp_path)
    steps = [
        {"use": "export", "with": {"format": "onnx", "to": "plain"}},
        {"use": "quantize_onnx", "with": {"to": "small", "method": "int8", "samples": 4, "sequence_length": 64}},
    ]
    steps[1]["limits"] = {"agreement": {"min": 0.5}, "perplexity_ratio": {"max": 1.2}}
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": {"builtin": "docs-llama"}, "steps": steps}))
    passed = CliRunner().invoke(app, ["run", "r.yaml"])
    assert passed.exit_code == 0, passed.stderr
    figures = re.search(r"\((\d\.\d{3}) times\), the same next token for\s+(\d\d\.\d)%", passed.stdout)
    assert figures is not None
    ratio, share = figures.groups()
    missed = CliRunner().invoke(app, ["run", "r.yaml", "--json", "--set", "quantize_onnx.limits={agreement: {min: 1}}"])
    assert missed.exit_code == QualityError.exit_code
    *_, stopped, error = map(json.loads, missed.stdout.splitlines())
    assert (stopped["event"], error["exit_code"]) == ("run_stopped", 5)
    assert re.search(r"agreement 0\.\d+ on .* is under min 1 by 0", error["message"])
    (row,) = [row for row in stopped["summary"]["models"] if row["metrics"]]
    assert row["label"] == "dense, ONNX int8"
    values = {column: metric["value"] for column, metric in row["metrics"].items()}
    assert values["agreement on builtin heldout"] == pytest.approx(float(share) / 100, abs=0.0006)
    assert values["perplexity_ratio on builtin heldout"] == pytest.approx(float(ratio), abs=0.0006)
    assert (tmp_path / "small" / "model.onnx").is_file()


def test_options_of_before_name_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = [{"use": "export", "with": {"format": "onnx", "to": "a"}}]
    steps += [{"use": "quantize_onnx", "with": {"to": "b", "min_agreement": 0.5}}]
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": {"builtin": "docs-llama"}, "steps": steps}))
    said = CliRunner().invoke(app, ["check", "r.yaml"])
    assert said.exit_code == 0, said.stderr
    assert "option 'min_agreement' of stage 'quantize_onnx' is deprecated: write `limits: {agreement: {min: …}}`" in said.stdout
    wrong = CliRunner().invoke(app, ["check", "r.yaml", "--set", "quantize_onnx.limits={agreemnt: {min: 1}}"])
    assert wrong.exit_code == 2
    assert "step 'quantize_onnx' gives no metric 'agreemnt'; did you mean 'agreement'?" in wrong.stderr


def test_a_calibration_set_is_asked_for() -> None:
    stage = QuantizeOnnx.model_validate({"to": "x", "rounding": "gptq"})
    with pytest.raises(OptionError, match="gptq needs a calibration set; put calibrate before this step"):
        stage.forecast(Forecasts(QuantizeOnnx))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "int8_dynamic", "block_size": 32}, "'block_size' belongs to methods 'int4' and 'int8'"),
        ({"method": "int8_dynamic", "rounding": "nearest"}, "'rounding' belongs to methods 'int4' and 'int8'"),
        ({"method": "int8", "rounding": "gptq"}, "rounding 'gptq' belongs to method 'int4'; the method is 'int8'"),
        ({"method": "int8", "eight_bits": 0.1}, "'eight_bits' belongs to method 'int4'; the method is 'int8'"),
        ({"block_size": 48}, "'block_size' must be a power of two, found 48"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeOnnx.model_validate({"to": "x", **options})
