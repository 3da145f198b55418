"""What a stage returns is stored as it is, or refused in one line that names the stage; the store never holds half of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app

pytestmark = pytest.mark.full

STAGE = '''
import math
from pathlib import Path
from typing import Any
import torch
from pydantic import BaseModel, ConfigDict, field_serializer
from gradmap_pipeline import Artifact, ModelGraph, Stage, TensorFile, hookimpl

class Thing(Artifact):
    model_config = ConfigDict(allow_inf_nan=True)
    value: Any
    file: TensorFile | None = None

class Odd(Stage):
    """Return something odd."""
    name = "make_odd"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        thing: Thing
    def run(self, inputs, context):
        return self.Outputs(thing=make(context.folder))

def make(folder):
    RETURN

@hookimpl
def gradmap_stages():
    return [Odd]
'''
CASES = {
    "not finite": ("return Thing(value=math.nan)", "value of Thing is not a finite number; an artifact holds finite numbers"),
    "object": ("return Thing(value=object())", "its outputs cannot be stored"),
    "tensor": ("return Thing(value=torch.zeros(2))", "its outputs cannot be stored"),
    "itself": ("x = []; x.append(x); return Thing(value=x)", "RecursionError"),
    "file that is not there": (
        "return Thing(value=1, file=TensorFile(path=folder / 'x.safetensors', sha256='0' * 64))",
        "its output 'thing' has the file 'x.safetensors', which is not there; write it before run() returns",
    ),
    "file in another folder": (
        "return Thing(value=1, file=TensorFile.save({'x': torch.zeros(2)}, Path('elsewhere.safetensors').resolve()))",
        "elsewhere.safetensors', which lies outside the step's folder; write it to context.folder, or name its place in writes()",
    ),
    "file that changed after it was hashed": (
        "file = TensorFile.save({'x': torch.zeros(2)}, folder / 'x.safetensors'); file.path.write_text('')\n"
        "    return Thing(value=1, file=file)",
        "its output file 'x.safetensors' is not what its digest says; write a file before it is hashed",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_that_cannot_be_stored(case: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(STAGE.replace("RETURN", code))
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: make_odd\n")
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "odd.py"])
    assert result.exit_code == 4, result.output
    assert result.stderr.startswith("error: step 'make_odd': stage 'make_odd'")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list((tmp_path / ".gradmap" / "steps").iterdir()) == []


@pytest.mark.parametrize("value", ["float('nan')", "object()", "{1, 2}"])
def test_units_that_cannot_be_stored(value: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "return Thing(value=1)"
    text = STAGE.replace("RETURN", code).replace("make(context.folder)", f"make(context.remember('x', lambda: {value}))")
    (tmp_path / "odd.py").write_text(text)
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: make_odd\n")
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "odd.py"])
    assert result.exit_code == 4, result.output
    assert "step 'make_odd': a value that it wants remembered cannot be stored" in result.stderr
    assert list((tmp_path / ".gradmap" / "units").iterdir()) == []


PATCH = '''
import torch
from pydantic import BaseModel
from gradmap_pipeline import ModelGraph, Stage, TensorFile, hookimpl

class Replace(Stage):
    """Replace a tensor."""
    name = "replace_tensor"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        file = TensorFile.save({"STORED": VALUE}, context.folder / "patch.safetensors")
        return self.Outputs(model=inputs.model.with_patches({"model.norm.weight": file}, "replaced"))

@hookimpl
def gradmap_stages():
    return [Replace]
'''
PATCHES = {
    "right": ("torch.ones(32)", "model.norm.weight", None),
    "shape": ("torch.ones(31)", "model.norm.weight", "replaces 'model.norm.weight' of shape (32,) by one of shape (31,); keep the"),
    "type": ("torch.ones(32).half()", "model.norm.weight", "of type float32 by one of type float16; convert it before saving"),
    "values": ("torch.ones(32) / 0", "model.norm.weight", "replaces 'model.norm.weight' by values of which 32 are not finite"),
    "name": ("torch.ones(32)", "norm", "by the file 'patch.safetensors', which has no tensor of that name"),
}


@pytest.mark.parametrize("case", PATCHES)
def test_replaced_tensors_that_do_not_fit(case: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, stored, message = PATCHES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(PATCH.replace("VALUE", value).replace("STORED", stored))
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: replace_tensor\n")
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "odd.py"])
    assert result.exit_code == (0 if message is None else 4), result.output
    assert message is None or message in result.stderr
    assert len(list((tmp_path / ".gradmap" / "steps").iterdir())) == (1 if message is None else 0)
