"""Exported graphs in the programs that people run them with: 64 greedy tokens, as torch has them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from programs import Rows, find_transformers_js, make_older_python, run_genai, run_optimum, run_transformers_js
from transformers import AutoModelForCausalLM, AutoTokenizer
from walk import make_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gradmap_plugins.export import ExportModel
from gradmap_plugins.quantize_onnx import QuantizeOnnx

from gradmap_pipeline import ModelGraph, OnnxFolder
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
from gradmap_pipeline.export.ort.session import OnnxSession
from gradmap_pipeline.testing import run_stage

pytestmark = pytest.mark.slow
REAL = "GRADMAP_REAL_MODELS"
TOKENS = 64
TEXTS = ["The quick brown fox jumps over the lazy dog, and then", "def read(file):"]
MODELS = ["builtin", "pruned-gemma3", "gemma3-270m"]
REMOVED = {"gemma3-270m": [2, 5, 9], "smollm2-135m": [3, 4, 13, 14, 17, 22, 25, 26]}


@dataclass(frozen=True)
class Case:
    """An exported graph, a batch of which one row is padded, and what torch adds to each row."""

    exported: OnnxFolder
    ids: Rows
    mask: Rows
    expected: Rows


def open_graph(name: str, folder: Path) -> ModelGraph:
    if name == "builtin":
        return open_folder(BUILTIN_FOLDER)
    if name == "pruned-gemma3":
        return open_folder(make_model(folder / "model", "gemma3_text")).without_layers([2, 4])
    place = os.environ.get(REAL)
    if place is None:
        pytest.skip(f"the folder with {name} is not named: set {REAL}")
    return open_folder(Path(place) / name, dtype="float32").without_layers(REMOVED[name])


def export(graph: ModelGraph, folder: Path, layout: str) -> OnnxFolder:
    stage = ExportModel.model_validate({"format": "onnx", "to": folder / f"onnx-{layout}", "onnx": {"layout": layout}})
    exported = run_stage(stage, folder / f"export-{layout}", model=graph).exported
    assert isinstance(exported, OnnxFolder)
    return exported


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    graph = open_graph(request.param, folder)
    run_stage(ExportModel(to=folder / "torch"), folder / "export-torch", model=graph)
    tokenizer = AutoTokenizer.from_pretrained(folder / "torch", padding_side="left")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert int(mask.min()) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "torch", dtype=torch.float32).eval()
    made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    expected = made[:, ids.shape[1] :].tolist()
    del model
    return Case(export(graph, folder, "onnx"), ids.tolist(), mask.tolist(), expected)


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_older_python(tmp_path_factory.mktemp("optimum") / "environment")


def test_transformers_js_says_the_same(case: Case) -> None:
    assert run_transformers_js(find_transformers_js(), case.exported.folder, case.ids, case.mask, TOKENS) == case.expected


def test_optimum_says_the_same(case: Case, optimum: str) -> None:
    assert run_optimum(optimum, case.exported.folder, case.ids, case.mask, TOKENS) == case.expected


def test_genai_says_the_same(case: Case) -> None:
    """Row by row, since it cannot be told of padding; two rows of one length together."""
    for row, mask, expected in zip(case.ids, case.mask, case.expected, strict=True):
        ids = [token for token, real in zip(row, mask, strict=True) if real]
        assert run_genai(case.exported.folder, [ids, ids], TOKENS) == [expected, expected]


@pytest.mark.parametrize("method", ["int8", "int8_dynamic", "int4"])
@pytest.mark.parametrize(("name", "layout"), [("builtin", "flat"), ("builtin", "onnx"), ("smollm2-135m", "onnx")])
def test_quantised_graphs_run_everywhere(method: str, name: str, layout: str, optimum: str, tmp_path: Path) -> None:
    """As ONNX Runtime runs them here; transformers.js has an older one, in which sums round otherwise."""
    plain = export(open_graph(name, tmp_path), tmp_path, layout)
    stage = QuantizeOnnx.model_validate({"method": method, "to": tmp_path / "small", "samples": 2})
    folder = run_stage(stage, tmp_path / "quantise", exported=plain).exported.folder
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[:1])["input_ids"]
    mask = [[1] * len(ids[0])]
    session = OnnxSession(folder)
    cache, new, seen, expected = session.start(1), torch.tensor(ids), torch.tensor(mask), []
    for _ in range(8):
        logits, cache = session.run(new, seen, cache)
        logits[:, :, 0] = -torch.inf  # the end of a text
        new = logits[:, -1:].argmax(-1)
        seen = torch.cat([seen, torch.ones_like(new)], dim=1)
        expected.append(int(new))
    assert run_optimum(optimum, folder, ids, mask, 8) == [expected]
    assert run_genai(folder, ids, 8) == [expected]
    if layout == "onnx":
        assert run_transformers_js(find_transformers_js(), folder, ids, mask, 8) == [expected]
