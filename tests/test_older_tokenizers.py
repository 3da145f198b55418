"""Exported tokenizers are known to programs built on transformers 4, and give the same ids there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gradmap_plugins.export import ExportModel
from programs import make_older_python
from test_onnx_programs import REAL
from tiny import make_model
from transformers import AutoTokenizer

from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.older_tokenizer import with_older_words
from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
from gradmap_pipeline.checkpoint.tokenizer_check import TEXTS
from gradmap_pipeline.testing import run_stage

CONFIG = "tokenizer_config.json"
CHAT = [{"role": "user", "content": "Grüße 👍🏽"}]


def export(model: Path, folder: Path) -> Path:
    run_stage(ExportModel(to=folder), folder.with_name(f"{folder.name}-work"), model=open_folder(model))
    return folder


def write_config(model: Path, **changes: Any) -> None:
    content = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps({**content, **changes}))


def make_with_further_tokens(folder: Path) -> Path:
    """Special tokens besides the named ones, as transformers 5 saves them, and a chat template."""
    model = make_model(folder)
    write_config(model, extra_special_tokens=["a", "<s>"], tokenizer_class="TokenizersBackend")
    (model / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    return model


@pytest.mark.parametrize(
    ("content", "older"),
    [
        (
            {"tokenizer_class": "TokenizersBackend", "a": 1},
            {"tokenizer_class": "PreTrainedTokenizerFast", "a": 1, "model_input_names": ["input_ids", "attention_mask"]},
        ),
        ({"tokenizer_class": "GemmaTokenizer"}, {"tokenizer_class": "GemmaTokenizer"}),
        ({"extra_special_tokens": ["x", "y"]}, {"additional_special_tokens": ["x", "y"]}),
        (
            {"extra_special_tokens": ["x", "y"], "additional_special_tokens": ["y", "z"]},
            {"additional_special_tokens": ["y", "z", "x"]},
        ),
        ({"extra_special_tokens": {"image_token": "<i>"}}, {"extra_special_tokens": {"image_token": "<i>"}}),
    ],
)
def test_older_words(content: dict[str, Any], older: dict[str, Any]) -> None:
    assert with_older_words(content) == older


def test_an_export_names_a_class_that_both_know(tmp_path: Path) -> None:
    model = make_with_further_tokens(tmp_path / "model")
    folder = export(model, tmp_path / "out")
    content = json.loads((folder / CONFIG).read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (content["additional_special_tokens"], "extra_special_tokens" in content) == (["a", "<s>"], False)
    ours, theirs = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(folder)
    assert theirs.extra_special_tokens == ours.extra_special_tokens == ["a", "<s>"]


def test_a_tokenizer_that_its_file_alone_does_not_give_keeps_its_words(tmp_path: Path) -> None:
    """The class of Gemma's makes a normaliser of its own, which tokenizer.json lacks."""
    model = make_model(tmp_path / "model")
    alone = AutoTokenizer.from_pretrained(model)("a b")["input_ids"]
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<unk>"] = len(tokenizer["model"]["vocab"])
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_config(model, tokenizer_class="GemmaTokenizer", extra_special_tokens=["a"])
    assert AutoTokenizer.from_pretrained(model)("a b")["input_ids"] != alone
    assert json.loads((export(model, tmp_path / "out") / CONFIG).read_text())["extra_special_tokens"] == ["a"]


@pytest.mark.slow
def test_transformers_4_reads_the_same_ids(tmp_path: Path) -> None:
    """Of the built-in model, of one with further special tokens, and of real ones where their folder is named."""
    models = {"builtin": BUILTIN_FOLDER, "further": make_with_further_tokens(tmp_path / "model")}
    if REAL in os.environ:
        models |= {name: Path(os.environ[REAL]) / name for name in ("smollm2-135m", "gemma3-270m")}
    python = make_older_python(tmp_path / "environment")
    code = (
        "import json, sys, transformers; from transformers import AutoTokenizer\n"
        "assert transformers.__version__ == '4.57.6', transformers.__version__\n"
        "folder, asked = sys.argv[1], json.load(open(sys.argv[2])); tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "found = [[tokenizer(t, add_special_tokens=a)['input_ids'] for a in (True, False)] for t in asked['texts']]\n"
        "chat = tokenizer.apply_chat_template(asked['chat'], tokenize=False) if tokenizer.chat_template else None\n"
        "print(json.dumps([found, chat]))"
    )
    texts = [*TEXTS, "<s> a </s> special <|im_start|>user\nx<|im_end|> <bos>"]
    (tmp_path / "asked.json").write_text(json.dumps({"texts": texts, "chat": CHAT}))
    for name, model in models.items():
        folder = export(model, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = [[tokenizer(text, add_special_tokens=adding)["input_ids"] for adding in (True, False)] for text in texts]
        chat = tokenizer.apply_chat_template(CHAT, tokenize=False) if tokenizer.chat_template else None
        command = [python, "-c", code, str(folder), str(tmp_path / "asked.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [ids, chat], name
