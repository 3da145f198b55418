"""Ids of tokens that the model has no embedding for are refused where text becomes ids; padding is not text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.evaluate import Evaluate
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoTokenizer

from gradmap_pipeline import StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.data import count_embeddings, load_tokenizer, make_sequences
from gradmap_pipeline.testing import run_stage

MESSAGE = r"token '<\|im_start\|>' has the id {}, but the model has {} token embeddings \(ids 0 to {}\); tokens were added to the"


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with as many embeddings as its tokenizer had tokens before one was added."""
    folder = make_model(tmp_path_factory.mktemp("added"), vocab_size=259)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, texts: list[str]) -> Path:
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.mark.parametrize("stage", [Calibrate, Evaluate])
def test_an_added_token_is_refused(stage: type, added: Path, tmp_path: Path) -> None:
    options = {"dataset": {"path": write(tmp_path, ["<|im_start|>user " * 9] * 9)}, "samples": 4, "sequence_length": 16}
    with pytest.raises(StageError, match=MESSAGE.format(259, 259, 258)):
        run_stage(stage.model_validate(options), tmp_path / "step", model=open_folder(added))


def test_text_without_it_and_padding_beyond_are_fine(added: Path, tmp_path: Path) -> None:
    options = {"dataset": {"path": write(tmp_path, ["one", "three"])}, "samples": 2, "sequence_length": 16, "packing": "none"}
    model = open_folder(added)
    assert load_tokenizer(model.base).pad_token_id == 260
    calibration = run_stage(Calibrate.model_validate(options), tmp_path / "c", model=model).calibration
    ids, mask = calibration.load()
    assert not ids[mask == 0].any()
    assert not mask.all()
    run_stage(Evaluate.model_validate(options), tmp_path / "e", model=model)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "opt"])
def test_embeddings_are_counted_in_the_checkpoint(architecture: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", architecture)
    assert count_embeddings(open_folder(folder).base) == 300
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    assert count_embeddings(open_folder(folder).base) == 300


def test_text_that_is_looked_at_and_not_drawn_is_checked(added: Path) -> None:
    base = open_folder(added).base
    tokenizer = load_tokenizer(base)
    texts = ["plain text"] * 7 + ["<|im_start|>"]
    for seed in range(5):
        with pytest.raises(StageError, match=MESSAGE.format(259, 259, 258)):
            make_sequences(tokenizer, texts, 16, 1, "none", seed=seed, embeddings=count_embeddings(base))


def test_resized_embeddings_take_the_token(added: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resized"
    folder.mkdir()
    for file in added.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    import torch

    wider = {
        name: torch.cat([tensor, tensor[:2]]) if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor
        for name, tensor in tensors.items()
    }
    save_file(wider, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 261}))
    options = {"dataset": {"path": write(tmp_path, ["<|im_start|>user " * 9] * 9)}, "samples": 4, "sequence_length": 16}
    run_stage(Evaluate.model_validate(options), tmp_path / "step", model=open_folder(folder))


@pytest.mark.parametrize("processor", ["template", "roberta"])
def test_an_id_of_the_post_processor_alone_is_told_as_such(processor: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", vocab_size=259)
    content = json.loads((model / "tokenizer.json").read_text())
    if processor == "template":
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [259], "tokens": ["</s>"]}},
        }
    else:
        content["post_processor"] = {
            "type": "RobertaProcessing",
            "sep": ["</s>", 259],
            "cls": ["<s>", 1],
            "trim_offsets": True,
            "add_prefix_space": False,
        }
    (model / "tokenizer.json").write_text(json.dumps(content))
    options = {"dataset": {"path": write(tmp_path, ["one two " * 9] * 9)}, "samples": 4, "sequence_length": 16}
    message = (
        r"the post-processor of the tokenizer \(tokenizer\.json\) adds '</s>' with the id 259, but the model has 259 "
        r"token embeddings \(ids 0 to 258\); the vocabulary gives that token the id 2: write"
    )
    with pytest.raises(StageError, match=message):
        run_stage(Calibrate.model_validate(options), tmp_path / "step", model=open_folder(model))
