"""A model is layers kept and tensors patched over a base; what is no model is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import make_model

from gradmap_pipeline import ModelGraph, TensorFile
from gradmap_pipeline.checkpoint.graph import open_folder, open_model
from gradmap_pipeline.checkpoint.source import ModelSource, count_layers, count_positions
from gradmap_pipeline.errors import ModelError

Q0, Q3 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 3))


@pytest.fixture
def graph(llama: Path) -> ModelGraph:
    return open_folder(llama)


@pytest.fixture
def patch(tmp_path: Path) -> TensorFile:
    return TensorFile.save({Q3: torch.ones(32, 32)}, tmp_path / "patch.safetensors")


def test_pruning_renumbers_and_copies_nothing(graph: ModelGraph) -> None:
    pruned = graph.without_layers([1, 2])
    assert (pruned.layers, pruned.removed, pruned.label) == ((0, 3), (1, 2), "pruned")
    names = pruned.export_tensors()
    assert names[Q0.replace(".0.", ".1.")].name == Q3
    assert not any(".layers.2." in name or ".layers.3." in name for name in names)
    assert pruned.dense == graph


def test_counts_are_those_of_the_files(graph: ModelGraph, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    assert graph.count_parameters() == sum(value.numel() for value in tensors.values())
    assert graph.size_bytes == sum(value.nbytes for value in tensors.values())
    half = graph.model_copy(update={"dtype": "bfloat16"})
    assert half.size_bytes * 2 == graph.size_bytes
    layer = sum(value.numel() for name, value in tensors.items() if ".layers.1." in name)
    assert graph.without_layers([1]).count_parameters() == graph.count_parameters() - layer


@pytest.mark.parametrize(
    ("architecture", "changes", "attention"),
    [("llama", {"head_dim": 24, "intermediate_size": 128}, 4 * 24), ("llama", {}, 32), ("gpt2", {}, 32)],
)
def test_inputs_of_the_map_behind_attention_are_known_from_shapes(
    architecture: str, changes: dict[str, Any], attention: int, tmp_path: Path
) -> None:
    graph = open_folder(make_model(tmp_path / "model", architecture, **changes))
    assert graph.attention_inputs() == attention


def test_patches_replace_follow_their_layer_and_go_with_it(graph: ModelGraph, patch: TensorFile) -> None:
    patched = graph.with_patches({Q3: patch}, "compensated")
    assert patched.stored_tensor(Q3).file == patch.path
    assert patched.without_layers([1]).export_tensors()[Q3.replace(".3.", ".2.")].file == patch.path
    assert patched.without_layers([3]).patches == {}
    with pytest.raises(ModelError, match=r"'lm_head.bias' cannot be patched: the base checkpoint has no tensor of that name"):
        graph.with_patches({"lm_head.bias": patch}, "compensated")


def test_removal_that_cannot_be(graph: ModelGraph) -> None:
    with pytest.raises(ModelError, match=r"layer 7 cannot be removed: the model has layers \[0, 1, 2, 3\]"):
        graph.without_layers([7])
    with pytest.raises(ModelError, match="removing 4 of 4 layers leaves none"):
        graph.without_layers(range(4))


def test_digest_is_of_content(graph: ModelGraph, llama: Path, patch: TensorFile, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "copy")
    copy = open_folder(tmp_path / "copy")
    assert copy.digest == graph.digest
    assert graph.without_layers([1]).digest != graph.digest
    assert graph.with_patches({Q3: patch}, "compensated").digest != graph.model_copy(update={"label": "compensated"}).digest
    moved = patch.path.rename(tmp_path / "moved.safetensors")
    elsewhere = graph.with_patches({Q3: patch.model_copy(update={"path": moved})}, "compensated")
    assert elsewhere.digest == graph.with_patches({Q3: patch}, "compensated").digest
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors[Q0][0, 0] += 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert open_folder(tmp_path / "copy").digest != graph.digest


def test_digest_survives_storage(graph: ModelGraph, patch: TensorFile) -> None:
    patched = graph.without_layers([0]).with_patches({Q3: patch}, "compensated")
    assert ModelGraph.model_validate_json(patched.model_dump_json()).digest == patched.digest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "give exactly one of 'path', 'id' and 'builtin'; found none"),
        ({"path": "x", "id": "y/z"}, "found 'path' and 'id'"),
        ({"path": "x", "revision": "main"}, "'revision' belongs to a hub model, given by 'id'"),
    ],
)
def test_source_that_says_too_much_or_too_little(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSource(**source)


def test_hub_id_without_a_network() -> None:
    with pytest.raises(ModelError) as caught:
        open_model(ModelSource(id="nobody/nothing"))
    message = str(caught.value)
    assert message.startswith("cannot get model 'nobody/nothing' from the Hugging Face hub (")
    assert message.endswith("check the name and the network, or download it elsewhere and use `model: {path: FOLDER}`")


def test_hub_cache_serves_without_a_network(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(llama, snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = ModelSource(id="owner/name")
    assert source.forecast().layers == 4
    graph = open_model(source)
    assert graph.base.from_hub
    assert graph.digest == open_folder(llama).digest


@pytest.mark.parametrize("damage_done", ["shard", "tokenizer", "quantised"])
def test_hub_cache_that_is_not_whole(damage_done: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted download is fetched again, and a quantised model is refused from the cache too."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(llama, snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    if damage_done == "shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage_done == "tokenizer":
        for file in snapshot.glob("tokenizer*"):
            file.unlink()
    else:
        damage(snapshot, damage_done)
        with pytest.raises(ModelError, match="is already quantised"):
            ModelSource(id="owner/name").find_folder()
        return
    assert ModelSource(id="owner/name").find_folder() is None


def damage(folder: Path, damage_done: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if damage_done == "no config":
        (folder / "config.json").unlink()
    elif damage_done == "broken config":
        (folder / "config.json").write_text("{")
    elif damage_done == "list":
        (folder / "config.json").write_text("[]")
    elif damage_done == "quantised":
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    elif damage_done == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif damage_done == "no weights":
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage_done", "message"),
    [
        ("no config", "is not a model folder: it has no config.json"),
        ("broken config", r"config.json' cannot be read: Expecting property name"),
        ("list", "must hold a JSON object, found list"),
        ("quantised", r"is already quantised \(gptq\); prune the original model first, then quantise"),
        ("pickle", r"has only 'pytorch_model.bin', which is a pickle and is never opened; weights must be in \*.safetensors"),
        ("no weights", "has no weights; weights must be in"),
    ],
)
def test_folder_that_is_no_model(damage_done: str, message: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    damage(tmp_path / "model", damage_done)
    with pytest.raises(ModelError, match=message):
        ModelSource(path=tmp_path / "model").forecast()


def test_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"no folder 'away'; relative paths start at the current folder, '{tmp_path}'"):
        ModelSource(path=Path("away")).forecast()


def test_depth_must_be_said_and_true(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"no single list of 5 layers, .* numbered tensors: model.layers.\* \(4\)"):
        open_folder(folder).without_layers([1]).export_tensors()
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not say how many layers the model has"):
        open_folder(folder)


@pytest.mark.parametrize("config", [{"num_hidden_layers": 3}, {"n_layer": 3}, {"text_config": {"num_hidden_layers": 3}}])
def test_depth_is_found_under_every_name(config: dict[str, Any]) -> None:
    assert count_layers(config) == 3


def test_positions_are_found_under_every_name() -> None:
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "other")
    assert [count_positions({key: 8}) for key in keys] == [8, 8, 8, None]
