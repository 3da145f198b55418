"""The GGUF stage around a converter; the converter itself is llama.cpp's."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gradmap_plugins.export_gguf import ExportGguf
from tiny import make_model
from typer.testing import CliRunner
from walk import make_model as make_any_model

from gradmap_pipeline import Forecasts, ModelGraph, OptionError, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import RecipeError
from gradmap_pipeline.export.llamacpp import pythons
from gradmap_pipeline.export.llamacpp.dry_run import explain_failure
from gradmap_pipeline.export.verify import verify_folder
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.plan import Plan, make_plan
from gradmap_pipeline.recipe.recipe import load_recipe
from gradmap_pipeline.testing import run_stage

CONVERTER = """
import json, sys
# --outfile, --outtype, --vocab-only
folder, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
config = json.load(open(folder + "/config.json"))
print("some log", file=sys.stderr)
{action}
"""
WRITES = (
    'open(options["--outfile"], "wb").write(b"GGUF" + json.dumps([config["num_hidden_layers"], options["--outtype"]]).encode())'
)


def make_converter(folder: Path, action: str) -> Path:
    file = folder / "convert_hf_to_gguf.py"
    file.write_text(CONVERTER.format(action=action))
    return file


@pytest.fixture
def graph(tmp_path: Path) -> ModelGraph:
    return open_folder(make_model(tmp_path / "model")).without_layers([1])


def test_converter_gets_the_pruned_model(graph: ModelGraph, tmp_path: Path) -> None:
    stage = ExportGguf(to=tmp_path / "out", converter=make_converter(tmp_path, WRITES), python=Path(sys.executable), type="q8_0")
    exported = run_stage(stage, tmp_path / "step", model=graph).exported
    assert (tmp_path / "out" / "model-q8_0.gguf").read_bytes() == b'GGUF[3, "q8_0"]'
    assert exported.files.keys() == {"model-q8_0.gguf", "README.md", "gradmap.json", "report.html"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "bytes in `model-q8_0.gguf`." in card
    assert "\nWeights quantised: Q8_0.\n" in card
    assert (exported.quantisation, exported.label) == ("q8_0", "pruned, GGUF q8_0")
    assert exported.max_logit_difference is None
    assert json.loads((tmp_path / "out" / "gradmap.json").read_text())["layers_removed"] == [1]
    assert not any((tmp_path / "step").iterdir())
    assert verify_folder(tmp_path / "out")[-1] == "model-q8_0.gguf is for llama.cpp, which is not asked here"


@pytest.mark.parametrize(("has_option", "words"), [(True, ["--model-name=tiny-1.7B-chat"]), (False, [])])
def test_the_converter_is_told_the_name(has_option: bool, words: list[str], tmp_path: Path) -> None:
    """The size in the name is the base's, and not what is left."""
    graph = open_folder(make_model(tmp_path / "tiny-1.7B-chat")).without_layers([1])
    action = 'open(options["--outfile"], "wb").write(b"GGUF" + json.dumps([folder.split("/")[-1], *sys.argv[6:]]).encode())'
    converter = make_converter(tmp_path, f"{action}  # {'--model-name' if has_option else ''}")
    run_stage(ExportGguf(to=tmp_path / "out", converter=converter), tmp_path / "step", model=graph)
    assert json.loads((tmp_path / "out" / "model-f16.gguf").read_bytes()[4:]) == ["tiny-chat", *words]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            "sys.exit('ERROR: BPE pre-tokenizer was not recognized')",
            "ended with code 1: ERROR: BPE pre-tokenizer was not recognized",
        ),
        ("pass", "ended without an error, and without a GGUF file; nothing was written"),
        ("open(options['--outfile'], 'w').write('x')", "ended without an error, and without a GGUF file; nothing was written"),
    ],
)
def test_converter_that_fails(action: str, message: str, graph: ModelGraph, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=message):
        run_stage(ExportGguf(to=tmp_path / "out", converter=make_converter(tmp_path, action)), tmp_path / "step", model=graph)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "convert_hf_to_gguf.py is not on the search path for programs: git clone https://github.com/ggml-org/llama.cpp"),
        ({"converter": "nowhere"}, "there is no file 'nowhere'"),
        ({"converter": "."}, "there is no file 'convert_hf_to_gguf.py'"),
        ({"converter": "notes.txt"}, "'notes.txt' has no option --outtype, so it is not llama.cpp's converter"),
        ({"converter": "old.gguf"}, "'old.gguf' is no Python file, so it is not llama.cpp's converter"),
        ({"python": "nowhere"}, "there is no file 'nowhere'"),
        ({"python": "notes.txt"}, r"'notes.txt' may not be started: chmod \+x notes.txt"),
    ],
)
def test_plan_looks_for_the_converter(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "notes.txt").write_text("--outfile")
    (tmp_path / "old.gguf").write_bytes(b"GGUF\0--outfile--outtype--vocab-only")
    with pytest.raises(OptionError, match=message):
        ExportGguf.model_validate({"to": tmp_path / "out", **options}).forecast(Forecasts(ExportGguf))


def plan(tmp_path: Path, model: Path, steps: list[dict[str, Any]]) -> Plan:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": steps}))
    return make_plan(load_recipe(recipe), load_catalog())


def exporting(tmp_path: Path, action: str = WRITES, **options: Any) -> dict[str, Any]:
    converter = make_converter(tmp_path, action)
    return {"use": "export_gguf", "with": {"to": str(tmp_path / "out"), "converter": str(converter), **options}}


def test_check_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    monkeypatch.setattr(pythons, "_ask", lambda _, modules, folders: list(modules))
    with pytest.raises(RecipeError, match=r"converter needs gguf, which '.*' lacks: .* -m pip install gguf"):
        plan(tmp_path, model, [exporting(tmp_path, "import gguf")])
    with pytest.raises(RecipeError, match=r"converter needs sentencepiece, which"):
        plan(tmp_path, model, [exporting(tmp_path, "def later():\n    from sentencepiece import SentencePieceProcessor")])
    made = plan(tmp_path, model, [exporting(tmp_path)])
    assert made.steps[0].advice[0].endswith(f"lacks llama-cpp-python: {sys.executable} -m pip install llama-cpp-python")


def test_a_python_is_asked_for_its_modules(tmp_path: Path) -> None:
    converter = make_converter(tmp_path, "import numpy, torch")
    assert pythons.explain_missing(sys.executable, converter) is None
    (tmp_path / "gguf-py" / "gguf").mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    bare = make_converter(other, "import gguf\nimport torch")
    message = pythons.explain_missing(sys.executable, bare)
    assert message is None if find_spec("gguf") else "converter needs gguf, which" in str(message)
    (other / "gguf-py" / "gguf").mkdir(parents=True)
    assert pythons.explain_missing(sys.executable, bare) is None
    assert pythons.explain_missing(str(converter), converter) == f"{str(converter)!r} does not run as a Python"


def test_check_refuses_what_the_converter_does_not_know(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(RecipeError, match="converter does not know LlamaForCausalLM; export in another format"):
        plan(tmp_path, model, [exporting(tmp_path, '# @ModelBase.register("GemmaForCausalLM")')])
    plan(tmp_path, model, [exporting(tmp_path, '# @ModelBase.register("LlamaForCausalLM")')])


SMOLLM3 = {"no_rope_layers": [1, 1, 1, 0] * 2, "num_hidden_layers": 8, "sliding_window": None, "use_sliding_window": False}


def test_check_refuses_what_no_file_can_say(tmp_path: Path) -> None:
    model = make_any_model(tmp_path / "model", "smollm3", layer_types=None, **SMOLLM3)
    steps = [{"use": "prune", "with": {"layers": [1]}}, exporting(tmp_path)]
    message = (
        "llama.cpp would take layer 3 for those with no rotary embedding, where the model has layers 2, 6, and no GGUF file can "
        "tell it; `prune: {among: regular}` chooses layers that leave the pattern as it is; export in another format"
    )
    with pytest.raises(RecipeError) as caught:
        plan(tmp_path, model, steps)
    assert message in str(caught.value)
    plan(tmp_path, model, [{"use": "prune", "with": {"layers": [1, 2, 3, 4]}}, exporting(tmp_path)])


def test_evaluate_takes_a_file(tmp_path: Path, graph: ModelGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [
        exporting(tmp_path),
        {"use": "evaluate", "from": {"model": "export_gguf.exported"}, "with": {"dataset": {"builtin": "heldout"}}},
    ]
    with monkeypatch.context() as patch:
        patch.setattr(pythons, "_ask", lambda _, modules, folders: [])
        assert plan(tmp_path, tmp_path / "model", steps).steps[1].inputs == {"model": ("export_gguf", "exported")}
    exported = run_stage(ExportGguf.model_validate(steps[0]["with"]), tmp_path / "step", model=graph).exported
    monkeypatch.setattr(pythons, "_ask", lambda _, modules, folders: list(modules))
    with pytest.raises(StageError, match=r"nothing runs the file, as '.*' lacks llama-cpp-python: .* -m pip install"):
        exported.open("cpu")


def test_a_module_that_the_converter_lacks_for_this_model_is_told_with_its_command(tmp_path: Path) -> None:
    converter = make_converter(tmp_path, "import tiktoken_of_nobody")
    failure = explain_failure(open_folder(make_model(tmp_path / "model")), converter, sys.executable)
    assert str(failure).endswith(f"No module named 'tiktoken_of_nobody': {sys.executable} -m pip install tiktoken_of_nobody")


def test_a_model_that_the_converter_refuses_is_told_before_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter reads the whole model, as an export would have it, without writing."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    refuses = """open(folder + "/model.safetensors", "rb").read(8)
assert "--dry-run" in sys.argv and config["num_hidden_layers"] == 4
config["n_ctx"]
"""
    converter = make_converter(tmp_path, refuses)
    steps = [{"use": "prune", "with": {"layers": [1]}}, {"use": "export_gguf", "with": {"to": "out", "converter": str(converter)}}]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    monkeypatch.setattr(pythons, "explain_missing", lambda *_: None)
    for command in ("check", "run"):
        result = CliRunner().invoke(app, [command, "r.yaml"])
        assert result.exit_code == 2, result.output
        said = " ".join(result.stderr.split())
        assert "llama.cpp's converter ended with code 1: KeyError: 'n_ctx'; export in another format" in said
        assert not (tmp_path / ".gradmap/steps").exists() or not any((tmp_path / ".gradmap/steps").iterdir())


@pytest.mark.parametrize("has_runner", [True, False])
def test_check_says_that_nothing_can_evaluate_a_file(has_runner: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Python that a step before names, of the quantised file too."""
    monkeypatch.chdir(tmp_path)
    named, program = tmp_path / "named" / "python", tmp_path / "named" / "llama-quantize"
    named.parent.mkdir()
    for file in (named, program):
        file.touch(0o755)
    asked = {str(named)} if has_runner else set()
    monkeypatch.setattr(
        pythons, "_ask", lambda python, modules, _: [name for name in modules if name == "llama_cpp" and python not in asked]
    )
    evaluating = {"dataset": {"builtin": "heldout"}, "samples": 2, "sequence_length": 16}
    make_model(tmp_path / "model")
    steps = [
        exporting(tmp_path, python=str(named)),
        {"use": "evaluate", "id": "file", "from": {"model": "export_gguf.exported"}, "with": evaluating},
        {"use": "quantize_gguf", "with": {"to": "small", "program": str(program)}},
        {"use": "evaluate", "id": "small", "from": {"model": "quantize_gguf.exported"}, "with": evaluating},
    ]
    if has_runner:
        assert plan(tmp_path, tmp_path / "model", steps).steps[3].forecasts == {}
        return
    with pytest.raises(RecipeError) as caught:
        plan(tmp_path, tmp_path / "model", steps)
    told = f"nothing runs the file, as {str(named)!r} lacks llama-cpp-python: {named} -m pip install llama-cpp-python"
    assert f"step 'file': {told}" in str(caught.value)
    assert f"step 'small': {told}" in str(caught.value)
    assert caught.value.exit_code == 2
