"""ONNX graphs against the torch models they come from, and the programs that run them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GenerationConfig
from walk import make_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
from gradmap_plugins.export import ExportModel
from gradmap_plugins.prune import Prune

from gradmap_pipeline import Forecasts, ModelGraph, OnnxFolder, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
from gradmap_pipeline.errors import CapacityError, ModelError
from gradmap_pipeline.export.ort import apart
from gradmap_pipeline.export.ort.session import OnnxSession
from gradmap_pipeline.stages.structure_probe import StructureProbe
from gradmap_pipeline.testing import run_stage

pytestmark = pytest.mark.full

PRUNED = ["llama", "gpt2", "gemma3_text", "mixtral"]
MORE = ["qwen3", "gpt_neox", "bloom", "opt", "gpt_neo", "phi3", "olmo2", "deepseek_v3", "gpt_oss"]


def export(graph: ModelGraph, folder: Path, **options: Any) -> OnnxFolder:
    exported = run_stage(ExportModel(format="onnx", to=folder / "onnx", **options), folder / "export", model=graph).exported
    assert isinstance(exported, OnnxFolder)
    return exported


def make_pruned(folder: Path, architecture: str) -> ModelGraph:
    graph = open_folder(make_model(folder / "model", architecture))
    pruned = run_stage(Prune(layers=[2, 4]), folder / "prune", model=graph).model
    assert isinstance(pruned, ModelGraph)
    return pruned


def generate_with_torch(folder: Path, prompt: torch.Tensor, tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    return [int(token) for token in model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, prompt.shape[1] :]]


def generate_with_graph(folder: Path, prompt: torch.Tensor, tokens: int, forbidden: list[int]) -> list[int]:
    session = OnnxSession(folder)
    cache, ids, mask, generated = session.start(1), prompt, torch.ones_like(prompt), []
    for _ in range(tokens):
        logits, cache = session.run(ids, mask, cache)
        logits[:, :, forbidden] = -torch.inf  # as min_new_tokens does
        ids = logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        generated.append(int(ids))
    return generated


def check_export(graph: ModelGraph, folder: Path) -> None:
    """Parity is part of the step; here, whether plain transformers and the graph say the same for 64 tokens."""
    exported = export(graph, folder)
    assert exported.max_logit_difference <= 1e-4
    run_stage(ExportModel(to=folder / "torch"), folder / "export-torch", model=graph)
    ends = AutoModelForCausalLM.from_pretrained(folder / "torch").config.get_text_config().eos_token_id
    prompt = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = generate_with_torch(folder / "torch", prompt, 64)
    forbidden = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    assert generate_with_graph(folder / "onnx", prompt, 64, forbidden) == expected


@pytest.mark.parametrize("architecture", PRUNED)
def test_graph_is_the_model(architecture: str, tmp_path: Path) -> None:
    check_export(make_pruned(tmp_path, architecture), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MORE)
def test_graph_is_the_model_of_more_architectures(architecture: str, tmp_path: Path) -> None:
    check_export(make_pruned(tmp_path, architecture), tmp_path)


@pytest.mark.slow
def test_graph_of_the_builtin_model(tmp_path: Path) -> None:
    check_export(open_folder(BUILTIN_FOLDER), tmp_path)


def test_folder_is_what_other_programs_expect(tmp_path: Path) -> None:
    """Names as Optimum's, no path of this machine, dimensions by name, config and tokenizer beside it."""
    exported = export(make_pruned(tmp_path, "llama"), tmp_path)
    names = set(exported.files)
    assert {"model.onnx", "model.onnx_data", "config.json", "genai_config.json", "tokenizer.json", "gradmap.json"} <= names
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(exported.folder / "model.onnx")
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.graph.input
    }
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "past_sequence_length + sequence_length"]
    assert shapes["past_key_values.3.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert [value.name for value in graph.graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    data = (exported.folder / "model.onnx").read_bytes()
    assert not re.search(rb"site-packages|Traceback|/tmp/|/home/|\.py", data)
    genai = json.loads((exported.folder / "genai_config.json").read_text())
    assert (genai["model"]["decoder"]["num_hidden_layers"], genai["model"]["decoder"]["head_size"]) == (4, 8)
    assert json.loads((exported.folder / "config.json").read_text())["num_hidden_layers"] == 4


def test_half_precision(tmp_path: Path) -> None:
    exported = export(make_pruned(tmp_path, "llama"), tmp_path, onnx={"dtype": "float16"})
    assert exported.label == "pruned, ONNX fp16"
    weights = (exported.folder / "model.onnx_data").stat().st_size
    assert weights < 0.6 * 4 * exported.graph.count_parameters()
    logits, _ = (session := OnnxSession(exported.folder)).run(*[torch.ones(1, 4, dtype=torch.long)] * 2, session.start(1))
    assert logits.dtype == torch.float16


def test_a_graph_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight changed between torch and the file: the step fails, says where, and leaves no folder."""
    import onnx_ir

    def spoil(graph: onnx_ir.Model, path: Path, **options: Any) -> None:
        name, value = next((n, v) for n, v in graph.graph.initializers.items() if v.shape.numpy() == (64, 32))
        value.const_value = onnx_ir.tensor(np.full((64, 32), 0.5, dtype=np.float32), name=name)
        save(graph, path, **options)

    save = onnx_ir.save
    monkeypatch.setattr(onnx_ir, "save", spoil)
    with pytest.raises(StageError, match=r"does not compute what the model does: with 3 sequences, in prefill, logits differ by"):
        export(make_pruned(tmp_path, "llama"), tmp_path)
    assert not (tmp_path / "onnx").exists()
    assert not list(tmp_path.glob(".onnx*"))


def test_states_that_are_no_keys_and_values_are_refused(tmp_path: Path) -> None:
    stage = ExportModel(format="onnx", to=tmp_path / "out")
    with pytest.raises(
        ModelError, match="format onnx needs layers that cache keys and values; 6 layers have a LinearAttentionLayer"
    ):
        stage.inspect(Forecasts(ExportModel), StructureProbe(open_folder(make_model(tmp_path / "model", "mamba")), 1 << 30))


def test_options_of_the_other_format() -> None:
    with pytest.raises(ValidationError, match="'onnx' belongs to format 'onnx'; the format is 'safetensors'"):
        ExportModel.model_validate({"to": "x", "onnx": {"dtype": "float16"}})
    with pytest.raises(ValidationError, match="'max_shard_gigabytes' belongs to format 'safetensors'"):
        ExportModel.model_validate({"to": "x", "format": "onnx", "max_shard_gigabytes": 1.0})


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma3_text"))]
)
def test_genai_says_the_same(architecture: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    graph = make_pruned(tmp_path, architecture)
    exported = export(graph, tmp_path)
    prompt = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    model = genai.Model(str(exported.folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=76, min_length=76, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    generated = [int(token) for token in generator.get_sequence(0)[12:]]
    run_stage(ExportModel(to=tmp_path / "torch"), tmp_path / "export-torch", model=graph)
    assert generated == generate_with_torch(tmp_path / "torch", prompt, 64)


@pytest.mark.slow
def test_large_graphs_are_traced_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, the same cases, and what goes wrong there arrives here."""
    graph = make_pruned(tmp_path, "llama")
    here = export(graph, tmp_path / "here")
    monkeypatch.setattr(apart, "ROOM", 0)
    there = export(graph, tmp_path / "there")
    for name in here.files.keys() - {"gradmap.json", "report.html"}:  # these say where the export was written
        assert there.files[name] == here.files[name], name
    assert there.max_logit_difference == here.max_logit_difference
    states = open_folder(make_model(tmp_path / "mamba", "mamba"))
    with pytest.raises(StageError, match="the tracer ended with code 1: AttributeError: 'MambaCausalLMOutput' object has no"):
        apart.write_graph(states, "float32", 0, tmp_path / "model.onnx")
    (tmp_path / "mamba" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        apart.write_graph(states, "float32", 0, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", CapacityError, "the tracer was killed by signal 9, as the system does when memory"),
        ("raise SystemExit('no such library')", StageError, "the tracer ended with code 1: no such library"),
    ],
)
def test_a_tracer_that_dies(
    program: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "ROOM", 0)
    monkeypatch.setattr(apart, "_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(error, match=message):
        export(make_pruned(tmp_path, "llama"), tmp_path)
    assert not (tmp_path / "onnx").exists()
    assert not list(tmp_path.glob(".onnx*"))
