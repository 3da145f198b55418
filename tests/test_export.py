"""Exports load with plain transformers and compute, to the last bit, what the pruned model computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins import export
from gradmap_plugins.export import ExportModel
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradmap_pipeline import (
    Export,
    Forecasts,
    Metric,
    ModelForecast,
    ModelGraph,
    OptionError,
    StageError,
    TensorFile,
    TransformersFolder,
)
from gradmap_pipeline.batches import make_batches
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.machine.digests import sha256_of
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.sample_pass import SamplePass
from gradmap_pipeline.testing import run_stage

UNKNOWN = {"exported": TransformersFolder.Forecast()}
"""The forecast of an export of which nothing is known."""


def make_patched(folder: Path, architecture: str, dtype: torch.dtype, tied: bool = False) -> ModelGraph:
    """A model without layers 0 and 2, with one weight replaced."""
    model = open_folder(make_model(folder / "base", architecture, tied=tied, dtype=dtype)).without_layers([0, 2])
    down = "mlp.c_proj" if architecture == "gpt2" else "mlp.down_proj"
    name = f"{model.base.layer_prefix}.3.{down}.weight"
    stored = model.base.tensors[name]
    value = torch.randn(stored.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return model.with_patches({name: TensorFile.save({name: value}, folder / "patch.safetensors")}, "compensated")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_computes_the_same(architecture: str, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = make_patched(tmp_path, architecture, dtype, tied)
    result = run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model).exported
    assert result.max_logit_difference == 0
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == dtype
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    sweep = SamplePass(LayerwiseModel(model, dtype=str(dtype).removeprefix("torch.")), make_batches(ids, torch.ones_like(ids)))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, next(iter(sweep.logits())))
        # The cache is indexed by layer: a wrong number shows in generation alone.
        tokens = loaded.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
        for length in range(40, tokens.shape[1]):
            again = loaded(input_ids=tokens[:, :length], use_cache=False).logits[0, -1]
            assert int(again.argmax()) == int(tokens[0, length])


def test_folder_holds_all_that_belongs_to_a_model(tmp_path: Path) -> None:
    model = make_patched(tmp_path, "llama", torch.float32)
    (model.base.folder / "LICENSE").write_text("terms")
    (model.base.folder / "notes.txt").write_text("private")
    metric = Metric(name="perplexity", value=12.5, better="lower", on="a text", model=model.digest)
    stage = ExportModel(to=tmp_path / "out")
    result = run_stage(stage, tmp_path / "work", model=model, metrics=[metric, metric]).exported
    on_disk = {file.name for file in (tmp_path / "out").iterdir()}
    assert on_disk == set(result.files)
    assert on_disk >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md", "gradmap.json"}
    assert "LICENSE" in on_disk
    assert "notes.txt" not in on_disk
    for name, file in result.files.items():
        assert (file.size, file.sha256) == ((tmp_path / "out" / name).stat().st_size, sha256_of(tmp_path / "out" / name))
    lineage = json.loads((tmp_path / "out" / "gradmap.json").read_text())
    assert lineage["layers_removed"] == [0, 2]
    assert lineage["base"]["sha256"] == model.base.sha256
    assert [(entry["name"], entry["value"]) for entry in lineage["metrics"]] == [("perplexity", 12.5)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Layers removed, counted from 0: 0, 2." in card
    assert card.count("| perplexity | a text | 12.500 | lower |") == 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"]) == 4


def test_metrics_of_another_model_are_left_out(tmp_path: Path) -> None:
    model = make_patched(tmp_path, "llama", torch.float32)
    metric = Metric(name="perplexity", value=12.5, better="lower", on="a text", model="0" * 64)
    run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model, metrics=[metric])
    assert json.loads((tmp_path / "out" / "gradmap.json").read_text())["metrics"] == []
    assert "a text" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cast_on_export(dtype: str, tmp_path: Path) -> None:
    base = open_folder(make_model(tmp_path / "base", dtype=torch.bfloat16), dtype=dtype)
    run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=base.without_layers([1]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype)).model.layers[2]
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, kept.mlp.up_proj.weight)


def test_shards(tmp_path: Path) -> None:
    model = make_patched(tmp_path, "llama", torch.float32)
    result = run_stage(ExportModel(to=tmp_path / "out", max_shard_gigabytes=4e-5), tmp_path / "work", model=model).exported
    assert "model.safetensors.index.json" in result.files
    assert sum(name.endswith(".safetensors") for name in result.files) > 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_earlier_export_is_replaced(tmp_path: Path) -> None:
    model = make_patched(tmp_path, "llama", torch.float32)
    run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model)
    assert ExportModel(to=tmp_path / "out").forecast(Forecasts(ExportModel)) == UNKNOWN
    run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model.without_layers([1]))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1
    assert {file.name for file in tmp_path.iterdir()} == {"base", "patch.safetensors", "out", "work"}


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match=r"holds 'thesis.tex', which is not part of an export; choose another") as caught:
        ExportModel(to=tmp_path / "out").forecast(Forecasts(ExportModel))
    assert caught.value.option == "to"
    assert ExportModel(to=tmp_path / "out", overwrite=True).forecast(Forecasts(ExportModel)) == UNKNOWN
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="is a file; name a folder"):
        ExportModel(to=tmp_path / "file").forecast(Forecasts(ExportModel, model=ModelForecast()))


def test_base_model_is_never_overwritten(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"is, holds or lies in .* which is being read; write to another folder"):
        run_stage(ExportModel(to=llama, overwrite=True), tmp_path, model=open_folder(llama))


@pytest.mark.parametrize("broken", ["weight", "layer_count"])
def test_a_wrong_export_is_noticed_and_removed(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change what is written behind the stage's back."""
    model = make_patched(tmp_path, "llama", torch.float32)
    write = ExportModel._write

    def write_wrongly(self: ExportModel, model: ModelGraph, folder: Path, context: Any) -> Any:
        files = write(self, model, folder, context)
        if broken == "weight":
            weights = bytearray((folder / "model.safetensors").read_bytes())
            weights[-2] ^= 0x40
            (folder / "model.safetensors").write_bytes(weights)
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        return files

    monkeypatch.setattr(ExportModel, "_write", write_wrongly)
    message = {"weight": "does not compute what the model does: logits differ by", "layer_count": "does not load: missing keys"}
    with pytest.raises(StageError, match=message[broken]):
        run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model)
    assert {file.name for file in tmp_path.iterdir()} == {"base", "patch.safetensors", "work"}


def test_overflow_in_the_exported_type_is_said(tmp_path: Path) -> None:
    base = open_folder(make_model(tmp_path / "base"), dtype="float16")
    name = "model.layers.3.mlp.down_proj.weight"
    patch = TensorFile.save({name: torch.full((32, 64), 1e30)}, tmp_path / "patch.safetensors")
    with pytest.raises(StageError, match=r"2,048 of the 2,048 values of .* do not fit into float16"):
        run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=base.with_patches({name: patch}, "broken"))


def test_interrupted_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_patched(tmp_path, "llama", torch.float32)
    run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model)
    before = sha256_of(tmp_path / "out" / "model.safetensors")

    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check_export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model.without_layers([1]))
    assert sha256_of(tmp_path / "out" / "model.safetensors") == before
    assert not list(tmp_path.glob(".out*"))


def test_files_of_others_in_an_earlier_export_are_kept(tmp_path: Path) -> None:
    model = make_patched(tmp_path, "llama", torch.float32)
    run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model)
    assert ExportModel(to=tmp_path / "out").forecast(Forecasts(ExportModel)) == UNKNOWN
    (tmp_path / "out" / "gguf").mkdir()
    with pytest.raises(OptionError, match=r"holds 'gguf', which is not part of an export"):
        ExportModel(to=tmp_path / "out").forecast(Forecasts(ExportModel))


def is_whole(exported: Export) -> bool:
    return all(sha256_of(path) == digest for path, digest in exported.files_by_path().items())


def test_export_with_the_files_of_another_model_is_not_taken_for_it(tmp_path: Path) -> None:
    """Same names, same sizes, other weights."""
    model = make_patched(tmp_path, "llama", torch.float32)
    first = run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=model).exported
    assert is_whole(first)
    name = next(iter(model.patches))
    zeros = TensorFile.save({name: torch.zeros(32, 64)}, tmp_path / "zeros.safetensors")
    other = model.with_patches({name: zeros}, "compensated")
    second = run_stage(ExportModel(to=tmp_path / "out"), tmp_path / "work", model=other).exported
    assert {name: file.size for name, file in first.files.items()} == {name: file.size for name, file in second.files.items()}
    assert is_whole(second)
    assert not is_whole(first)


def test_place_that_cannot_hold_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"cannot be made: '.*/file' is not a folder that can be written to"):
        ExportModel(to=tmp_path / "file" / "out").forecast(Forecasts(ExportModel))


MEASURE = """
import resource, sys
from pathlib import Path
import torch, transformers
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.testing import run_stage
from gradmap_plugins.export import ExportModel
transformers.LlamaForCausalLM
torch.set_num_threads(1)
folder = Path(sys.argv[1])
run_stage(ExportModel(to=folder / "warm"), folder / "work", model=open_folder(folder / "tiny").without_layers([1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_stage(ExportModel(to=folder / "out"), folder / "work", model=open_folder(folder / "big").without_layers([1, 3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.full
@pytest.mark.parametrize("layers", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_model(layers: int, tmp_path: Path) -> None:
    """30 layers are 1.0 GB in bf16, 6 layers 0.2 GB; peak resident memory, files mapped included, over that of a tiny export."""
    make_model(tmp_path / "tiny")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 256, "num_hidden_layers": layers}
    make_model(tmp_path / "big", dtype=torch.bfloat16, **sizes)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    grown = float(done.stdout.split()[-1])
    print(f"{layers} layers: {grown:.0f} MiB")
    assert grown < 200
