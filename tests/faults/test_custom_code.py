"""Code that comes with a checkpoint is never run, and nobody is asked whether to; no pickle is opened."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from gradmap_pipeline.checkpoint.pretrained import load_tokenizer, read_config
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import ModelError, StageError
from gradmap_pipeline.export.exports import load_folder
from gradmap_pipeline.export.verify import verify_folder

ROOT = Path(__file__).parent.parent.parent
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\nraise SystemExit('code of the checkpoint ran')\n"


def add_code(folder: Path, *files: str, **changes: Any) -> Path:
    """Classes of custom code for the config, the model and the tokenizer, in these JSON files."""
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Tokenizer", None]}
    for name in files:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": classes, **changes}))
    (folder / "mine.py").write_text(CODE)
    return folder


def write_recipe(folder: Path, model: Path, text: Path) -> str:
    data = {"dataset": {"path": str(text)}, "samples": 4, "sequence_length": 16}
    steps = [
        {"use": "evaluate", "with": data},
        {"use": "calibrate", "with": data},
        {"use": "prune", "with": {"layers": [1]}},
        {"use": "export", "with": {"to": str(folder / "out")}},
    ]
    (folder / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": steps}))
    return str(folder / "r.yaml")


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), input="y\ny\ny\ny\n")


@pytest.mark.parametrize("command", [("run", "--json"), ("plan", "--json"), ("plan",)])
def test_a_model_that_needs_custom_code_is_refused_in_one_line(
    command: tuple[str, ...], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_code(make_model(tmp_path / "model"), "config.json", model_type="mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    result = gradmap(command[0], write_recipe(tmp_path, model, text), *command[1:])
    assert result.exit_code == 2
    assert "needs custom code (auto_map of its config.json), which is not run: transformers itself has no model" in result.output
    assert "Do you wish" not in result.output
    assert not (model / "ran").exists()
    assert len(result.stderr.splitlines()) <= 1


def test_a_model_that_transformers_knows_leaves_its_code_behind(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_code(make_model(tmp_path / "model"), "config.json", "tokenizer_config.json", "generation_config.json")
    monkeypatch.chdir(tmp_path)
    result = gradmap("run", write_recipe(tmp_path, model, text))
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "left out 'auto_map' of config.json and generation_config.json and tokenizer_config.json, and the code it names" in said
    out = tmp_path / "out"
    assert not (model / "ran").exists()
    assert not list(out.glob("*.py"))
    assert not any("auto_map" in file.read_text() for file in out.glob("*config.json"))
    trusting = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(trusting).__name__ == "LlamaForCausalLM"
    assert len(AutoTokenizer.from_pretrained(out, trust_remote_code=True)("abc")["input_ids"]) == 4


def test_a_tokenizer_that_needs_custom_code_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", "gpt2")
    (model / "tokenizer.json").unlink()
    add_code(model, "tokenizer_config.json", tokenizer_class="MineTokenizer")
    monkeypatch.chdir(tmp_path)
    result = gradmap("run", write_recipe(tmp_path, model, text), "--json")
    assert result.exit_code == 2, result.output
    assert "has no tokenizer that transformers can load" in result.stdout
    assert not (model / "ran").exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_from_the_hub_are_refused(field: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, field: "someone/kernel"}))
    with pytest.raises(ModelError, match=rf"requires code from the hub \({field}: 'someone/kernel'\), which is not run"):
        read_config(model)


class _Opens:
    def __reduce__(self) -> Any:
        return (open, (str(self.place), "w"))

    place: Path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_no_pickle_is_opened(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    _Opens.place = tmp_path / "ran"
    torch.save({"model.norm.weight": _Opens()}, folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(StageError, match=r"safetensors"):
        load_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_verify_opens_no_pickle(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose own list of files names a pickle instead of safetensors."""
    monkeypatch.chdir(tmp_path)
    assert gradmap("run", write_recipe(tmp_path, make_model(tmp_path / "model"), text)).exit_code == 0
    out = tmp_path / "out"
    _Opens.place = tmp_path / "ran"
    (out / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Opens()}, out / "pytorch_model.bin")
    from gradmap_pipeline.machine.digests import sha256_of_value
    from gradmap_pipeline.stages.targets import OWN_DIGEST, describe_file

    lineage = json.loads((out / "gradmap.json").read_text())
    del lineage["files"]["model.safetensors"]
    lineage["files"]["pytorch_model.bin"] = describe_file(out / "pytorch_model.bin").model_dump()
    lineage[OWN_DIGEST] = sha256_of_value({key: value for key, value in lineage.items() if key != OWN_DIGEST})
    (out / "gradmap.json").write_text(json.dumps(lineage))
    with pytest.raises(StageError, match="safetensors"):
        verify_folder(out)
    assert not (tmp_path / "ran").exists()


def test_an_architecture_is_a_model_and_nothing_else(tmp_path: Path) -> None:
    """What a config names as its class is looked up in transformers, where other things have names too."""
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for named in (["AutoTokenizer"], ["pipeline"], ["logging"], "Llama", [7], [], None):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": named}))
        try:
            assert type(load_folder(folder, is_whole=True)).__name__ == "LlamaForCausalLM"
        except StageError as error:
            assert "architectures" in str(error)  # noqa: PT017 - transformers refuses some of them


def test_nothing_that_transformers_says_reaches_standard_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = add_code(make_model(tmp_path / "model"), "config.json", "tokenizer_config.json")
    read_config(folder)
    load_tokenizer(folder)
    load_folder(folder)
    assert capfd.readouterr() == ("", "")


def calls_of_transformers(file: Path) -> set[str]:
    """Names of what reads a folder by transformers' rules, called or imported in a file."""
    calls = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config", "get_class_from_dynamic_module"):
            calls.add(node.attr)
        names = [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        calls |= {name for name in names if name.startswith(("AutoConfig", "AutoTokenizer", "AutoModel", "AutoProcessor"))}
        if isinstance(node, ast.keyword) and node.arg and "trust_remote_code" in node.arg:
            assert isinstance(node.value, ast.Constant), file
            assert node.value.value is False, f"{file}: {ast.unparse(node)}"
    return calls


def test_one_file_asks_transformers_for_models() -> None:
    files = [*(ROOT / "gradmap_pipeline").rglob("*.py"), *(ROOT / "plugins").glob("*.py")]
    files = [file for file in files if file.parent.name != "tests"]  # of the templates of plugins
    calling = {file.relative_to(ROOT).as_posix() for file in files if calls_of_transformers(file)}
    assert calling == {"gradmap_pipeline/checkpoint/pretrained.py"}
    for node in ast.walk(ast.parse((ROOT / "gradmap_pipeline/checkpoint/pretrained.py").read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("from_pretrained", "from_config")
        ):
            given = ast.unparse(node)
            assert "**_LOCAL" in given or "trust_remote_code=False" in given, given


def test_libraries_that_are_given_models_load_none() -> None:
    """lm-eval and llm-compressor get a model and a tokenizer as objects, and are told not to run code."""
    assert "trust_remote_code=False" in (ROOT / "gradmap_pipeline/tasks/harness.py").read_text()
    assert "trust_remote_code_model=False" in (ROOT / "plugins/quantize_llmcompressor.py").read_text()


def test_no_question_is_asked_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_code(make_model(tmp_path / "model"), "config.json", model_type="mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ModelError, match="needs custom code"):
        read_config(folder)
    assert sys.stdin.tell() == 0
