"""The GGUF stage around a converter; the converter itself is llama.cpp's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from gradmap_plugins.export_gguf import ExportGguf
from tiny import make_model

from gradmap_pipeline import ModelGraph, OptionError, StageError
from gradmap_pipeline.errors import GradmapError
from gradmap_pipeline.model.graph import open_folder
from gradmap_pipeline.testing import run_stage
from gradmap_pipeline.verify import verify_folder

CONVERTER = """
import json, sys
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
    assert exported.files.keys() == {"model-q8_0.gguf", "gradmap.json"}
    assert exported.max_logit_difference is None
    assert json.loads((tmp_path / "out" / "gradmap.json").read_text())["layers_removed"] == [1]
    assert not any((tmp_path / "step").iterdir())
    assert verify_folder(tmp_path / "out")[-1] == "model-q8_0.gguf is for llama.cpp, which is not asked here"


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
        ({}, "convert_hf_to_gguf.py is not on the search path for programs; get llama.cpp"),
        ({"converter": "nowhere"}, "there is no file 'nowhere'"),
        ({"converter": "."}, "there is no file 'convert_hf_to_gguf.py'"),
        ({"python": "nowhere"}, "there is no file 'nowhere'"),
    ],
)
def test_plan_looks_for_the_converter(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OptionError, match=message):
        ExportGguf.model_validate({"to": tmp_path / "out", **options}).forecast({})


def test_nothing_here_evaluates_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmap_pipeline.catalog import load_catalog
    from gradmap_pipeline.plan import make_plan
    from gradmap_pipeline.recipe import load_recipe

    monkeypatch.setenv("PATH", str(tmp_path))
    converter = make_converter(tmp_path, WRITES)
    steps = [
        {"use": "export_gguf", "with": {"to": str(tmp_path / "out"), "converter": str(converter)}},
        {"use": "evaluate", "from": {"model": "export_gguf.exported"}, "with": {"dataset": {"builtin": "heldout"}}},
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": {"builtin": "docs-llama"}, "steps": steps}))
    with pytest.raises(GradmapError, match=r"input .model. takes a Model, but .export_gguf\.exported. is a GgufFolder"):
        make_plan(load_recipe(recipe), load_catalog())
