"""The tokenizer of an exported folder is that of the base: every file it needs comes along, and it is loaded and compared."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from gradmap_plugins.export import ExportModel
from gradmap_plugins.export_gguf import ExportGguf
from gradmap_plugins.quantize_onnx import QuantizeOnnx
from tiny import make_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gradmap_pipeline.checkpoint import tokenizer_check
from gradmap_pipeline.checkpoint.companions import find_companions, find_licences, find_tokenizer_files
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.tokenizer_check import check_tokenizer_copy
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import ModelError, StageError
from gradmap_pipeline.export.verify import verify_folder
from gradmap_pipeline.testing import run_stage

pytestmark = pytest.mark.full

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 👍🏽 日本語"},
    {"role": "assistant", "content": " ok\n"},
    {"role": "user", "content": "<s> again </s>"},
]
TEXTS = ["plain text", "日本語のテスト 中文", "👍🏽 🏳️‍🌈", " two  spaces\n\ttab ", "<s>special</s><pad>", "café e\u0301"]
TEMPLATES = {
    "default": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "tools": "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}{{ eos_token }}",
}


def assert_same_tokenizer(base: Path, folder: Path, templates: tuple[str, ...] = ()) -> None:
    """By transformers itself, on texts of this file."""
    ours, theirs = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    for template in templates:
        rendered = ours.apply_chat_template(CHAT, chat_template=template, tokenize=False)
        assert theirs.apply_chat_template(CHAT, chat_template=template, tokenize=False) == rendered
        assert "Grüße" in rendered


def export(model: Path, folder: Path, **options: Any) -> Path:
    run_stage(ExportModel(to=folder, **options), folder.with_name("work"), model=open_folder(model).without_layers([1]))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def add_templates(model: Path) -> None:
    """One by default, and one of another name in its folder."""
    (model / "chat_template.jinja").write_text(TEMPLATES["default"])
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text(TEMPLATES["tools"])


def test_chat_templates_in_files_come_along(model: Path, tmp_path: Path) -> None:
    add_templates(model)
    folder = export(model, tmp_path / "out")
    assert_same_tokenizer(model, folder, ("default", "tools"))
    lineage = json.loads((folder / "gradmap.json").read_text())
    assert "additional_chat_templates/tools.jinja" in lineage["files"]
    assert not any("not part of the export" in line for line in verify_folder(folder))
    (folder / "additional_chat_templates" / "mine.jinja").write_text("x")
    assert any("additional_chat_templates/mine.jinja" in line for line in verify_folder(folder))
    (folder / "additional_chat_templates" / "tools.jinja").write_text("other")
    with pytest.raises(StageError, match=r"tools.jinja has 5 bytes, not \d+"):
        verify_folder(folder)


def test_an_export_with_a_folder_of_templates_can_be_replaced(model: Path, tmp_path: Path) -> None:
    add_templates(model)
    export(model, tmp_path / "out")
    assert_same_tokenizer(model, export(model, tmp_path / "out"), ("tools",))


def test_graphs_keep_all_of_it(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    add_templates(model)
    exported = run_stage(ExportModel(to=tmp_path / "onnx", format="onnx"), tmp_path / "a", model=open_folder(model)).exported
    run_stage(QuantizeOnnx(to=tmp_path / "int8", method="int8"), tmp_path / "b", exported=exported)
    for folder in (tmp_path / "onnx", tmp_path / "int8"):
        assert_same_tokenizer(model, folder, ("default", "tools"))
        verify_folder(folder)


def test_quantised_weights_keep_all_of_it(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from gradmap_plugins.quantize_torchao import QuantizeTorchao

    add_templates(model)
    run_stage(QuantizeTorchao(to=tmp_path / "int8"), tmp_path / "a", model=open_folder(model))
    assert_same_tokenizer(model, tmp_path / "int8", ("default", "tools"))
    verify_folder(tmp_path / "int8")


def test_a_vocabulary_in_another_file_comes_along(tmp_path: Path) -> None:
    """GPT-NeoX Japanese reads emoji from a file of their own."""
    from walk import make_model as make_any_model

    model = make_any_model(tmp_path / "model", "gpt_neox_japanese")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"<|byte{number}|>" for number in range(256)),
        "日",
        "本",
        "<|emoji1|>",
        "語",
        "の",
    ]
    (model / "vocab.txt").write_text("\n".join(words) + "\n")
    (model / "emoji.json").write_text(json.dumps({"emoji": {"😀": "<|emoji1|>"}, "emoji_inv": {"<|emoji1|>": "😀"}}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTNeoXJapaneseTokenizer"}))
    folder = tmp_path / "out"
    run_stage(ExportModel(to=folder), tmp_path / "work", model=open_folder(model))
    assert_same_tokenizer(model, folder)
    ids = AutoTokenizer.from_pretrained(folder)("日本語😀")["input_ids"]
    assert words.index("<|emoji1|>") in ids


def names_of_tokenizer_files() -> set[str]:
    """All that the tokenizers of transformers read, by their classes."""
    files: set[str] = set()
    for part in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if ".tokenization_" in part.name:
            try:
                module = importlib.import_module(part.name)
            except (ImportError, NameError):  # wants a library that is not here
                continue
            for value in list(vars(module).values()):
                names = getattr(value, "vocab_files_names", None)
                files |= {name for name in (names or {}).values() if isinstance(name, str)} if isinstance(value, type) else set()
            files |= {name for name in getattr(module, "VOCAB_FILES_NAMES", {}).values() if isinstance(name, str)}
    return files


def test_all_files_that_tokenizers_of_transformers_name_are_known(tmp_path: Path) -> None:
    names = names_of_tokenizer_files() | {"tokenizer.4.0.json", "tekken.json", "tiktoken.model", "qwen.tiktoken"}
    assert {"emoji.json", "spiece.model", "vocab.json"} <= names
    for name in names:
        (tmp_path / name).write_text("{}")
    assert {file.name for file in find_tokenizer_files(tmp_path)} == names


def test_what_comes_along_and_what_does_not(tmp_path: Path) -> None:
    licences = {
        "LICENSE",
        "license.md",
        "LICENCE.txt",
        "Copying",
        "NOTICE.txt",
        "Use_Policy.md",
        "LICENSE-CODE",
        "THIRD_PARTY_NOTICES",
    }
    others = {"generation_config.json", "preprocessor_config.json"}
    never = {
        "tokenizer.py",
        "tokenizer.bin",
        "tokenizer.pkl",
        "README.md",
        "modeling.py",
        "pytorch_model.bin",
        "license.pt",
        "x.model.zip",
    }
    for name in licences | others | never:
        (tmp_path / name).write_text("{}")
    assert {file.name for file in find_licences(tmp_path)} == licences
    assert {file.name for file in find_companions(tmp_path)} == licences | others


def test_licences_come_along_to_every_format(model: Path, tmp_path: Path) -> None:
    for name in ("license.txt", "COPYING", "Notice"):
        (model / name).write_text(name)
    export(model, tmp_path / "out")
    converter = tmp_path / "convert_hf_to_gguf.py"
    action = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'wb').write(b'GGUF')"
    converter.write_text(f"{action}  # --outtype, --vocab-only")
    run_stage(ExportGguf(to=tmp_path / "gguf", converter=converter), tmp_path / "g", model=open_folder(model))
    for folder in (tmp_path / "out", tmp_path / "gguf"):
        assert {"license.txt", "COPYING", "Notice"} <= {file.name for file in folder.iterdir()}


def spoil(folder: Path, what: str) -> None:
    """Change one thing in the tokenizer of a folder."""
    tokenizer, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    if what == "ids":
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    elif what == "emoji":
        tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "👍"}, "content": "+"}
    elif what == "decoding":
        tokenizer["decoder"] = {"type": "Fuse"}
    elif what == "special":
        config["eos_token"] = "<pad>"
    elif what == "more":
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 259, "content": "<new>"})
    elif what == "template":
        config["chat_template"] = "{{ messages }}"
    else:
        (folder / "tokenizer.json").unlink()
        return
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("ids", "becomes .* instead of"),
        ("emoji", "'👍.* becomes .* instead of"),
        ("decoding", "is decoded to .* instead of"),
        ("special", "its special tokens: .*<pad>"),
        ("more", "the number of its tokens: 260 instead of 259"),
        ("template", "its chat templates: '{{ messages }}' instead of None"),
        ("gone", "the tokenizer cannot be exported: .* has no tokenizer that transformers can load"),
    ],
)
def test_every_difference_is_found(what: str, message: str, model: Path, tmp_path: Path) -> None:
    copy = make_model(tmp_path / "copy")
    check_tokenizer_copy(model, copy)
    spoil(copy, what)
    with pytest.raises(StageError, match=rf"{message}.*nothing was written"):
        check_tokenizer_copy(model, copy)


def test_an_export_whose_tokenizer_differs_is_not_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer that reads a file which no list names."""
    (model / "words.txt").write_text("hidden")
    load = tokenizer_check.load_tokenizer

    def load_with_file(folder: Path) -> Any:
        if not (folder / "words.txt").is_file():
            raise ModelError(f"{str(folder)!r} has no tokenizer that transformers can load (no words.txt)")
        return load(folder)

    monkeypatch.setattr(tokenizer_check, "load_tokenizer", load_with_file)
    with pytest.raises(StageError, match=r"the tokenizer cannot be exported: .*no words.txt.*; nothing was written"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_exported_without_one(model: Path, tmp_path: Path) -> None:
    for file in find_tokenizer_files(model):
        file.unlink()
    assert not find_tokenizer_files(export(model, tmp_path / "out"))


def test_a_word_that_is_the_name_of_a_field_stays(model: Path, tmp_path: Path) -> None:
    """`auto_map` leaves the configs, not a vocabulary."""
    vocabulary = {"auto_map": 0, "b": 1}
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    folder = export(model, tmp_path / "out")
    assert json.loads((folder / "vocab.json").read_text()) == vocabulary


def test_whole_run_keeps_the_templates(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_templates(model)
    monkeypatch.chdir(tmp_path)
    steps = [{"use": "prune", "with": {"layers": [1]}}, {"use": "export", "with": {"to": "out"}}]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    for arguments in (["run", "r.yaml"], ["verify", "out"], ["run", "r.yaml", "--quiet"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert_same_tokenizer(model, tmp_path / "out", ("default", "tools"))
