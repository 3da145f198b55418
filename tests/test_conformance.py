"""The kit finds each way in which a stage can break its contract, and nothing in one that keeps it."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gradmap_pipeline import ModelGraph, Stage
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import GradmapError
from gradmap_pipeline.machine.memory import resident_bytes
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.testing import check_stage
from gradmap_pipeline.testing.witness import Seen

STAGE = '''
import atexit, os, random, threading
from pathlib import Path
from typing import Any
import torch
from pydantic import BaseModel, ConfigDict, Field
from gradmap_pipeline import Artifact, ModelGraph, Stage, TensorFile, hookimpl

ELSEWHERE = Path("ELSEWHERE_FOLDER")
NORM = "model.norm.weight"
release = threading.Event()

class Thing(Artifact):
    value: Any
    file: TensorFile | None = None

class Hidden(Artifact):
    value: int = Field(exclude=True)

class Odd(Stage):
    """Do something odd."""
    name = "do_odd"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
        thing: Thing | Hidden | None = None
    def forecast(self, inputs):
        return FORECAST
    def run(self, inputs, context):
        model, thing = inputs.model, None
        BODY
        return self.Outputs(model=model, thing=thing)

def patch(context, tensor, name=NORM):
    return {NORM: TensorFile.save({name: tensor}, context.folder / "patch.safetensors")}

@hookimpl
def gradmap_stages():
    return [Odd]
'''
GOOD = "model = model.with_patches(patch(context, torch.ones(32)), 'patched'); context.note('done')"
FAULTS = {
    "random": ("thing = Thing(value=random.random())", "the second run gives another output at 'thing.value'; take random numbers"),
    "label": ("object.__setattr__(inputs.model, 'label', 'mine')", "it changes its inputs at 'model.fields.label'; make a copy"),
    "deep": ("inputs.model.base.__dict__['name'] = 'mine'", "it changes its inputs at 'model.fields.base.name'"),
    "attribute": ("object.__setattr__(inputs.model, 'mine', 1)", "it changes its inputs at 'model.further'"),
    "file of an input": (
        "inputs.model.patches[NORM].path.write_text('')",
        "patch.safetensors', a file of its inputs",
    ),
    "missing file": (
        "thing = Thing(value=1, file=TensorFile(path=context.folder / 'x', sha256='0' * 64))",
        "its output 'thing' has the file 'x', which is not there",
    ),
    "file elsewhere": (
        "thing = Thing(value=1, file=TensorFile.save({'x': torch.ones(1)}, ELSEWHERE / 'x'))",
        "which lies outside the step's folder",
    ),
    "digest": (
        "file = TensorFile.save({'x': torch.ones(1)}, context.folder / 'x'); thing = Thing(value=1, file=file); "
        "file.path.write_text('')",
        "its output file 'x' is not what its digest says",
    ),
    "shape": ("model = model.with_patches(patch(context, torch.ones(31)), 'x')", "of shape (32,) by one of shape (31,)"),
    "type": ("model = model.with_patches(patch(context, torch.ones(32).half()), 'x')", "of type float32 by one of type float16"),
    "infinity": ("model = model.with_patches(patch(context, torch.ones(32) / 0), 'x')", "values of which 32 are not finite"),
    "writing": ("(ELSEWHERE / 'y').write_text(str(random.random()))", "y'; write to context.folder, or name the place in writes()"),
    "removing": ("(ELSEWHERE / f'kept-{len(os.listdir(ELSEWHERE))}').unlink()", "it writes or removes "),
    "printing": ("print('hello')", "it prints to standard output ('hello'); use context.note"),
    "printing past Python": ("os.write(1, b'hello')", "it prints to standard output ('hello'); use context.note"),
    "thread": (
        "threading.Thread(target=release.wait, name='mine').start()",
        "its thread 'mine' still runs after run() has returned",
    ),
    "folder": ("os.chdir(context.folder)", "it changes the current folder, which other steps of the run share"),
    "environment": ("os.environ['MINE'] = str(random.random())", "it changes variables of the environment"),
    "torch": ("torch.set_grad_enabled(not torch.is_grad_enabled())", "it changes whether torch records gradients"),
    "not stored": ("thing = Thing(value=object())", "its outputs cannot be stored"),
    "stored as another": ("thing = Hidden(value=1)", "its outputs cannot be stored"),
    "failure": ("raise ValueError('no\\nway')", "of odd.py: ValueError: no; way"),
    "no outputs": ("return 3", "run() must return its Outputs, and returns 3"),
}


def load_stage(folder: Path, body: str, forecast: str = "{}") -> Stage:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    for number in range(1, 3):
        (elsewhere / f"kept-{number}").write_text("kept")
    file = folder / "odd.py"
    text = STAGE.replace("BODY", body).replace("FORECAST", forecast).replace("ELSEWHERE_FOLDER", str(elsewhere))
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("odd_stage", file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["odd_stage"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Odd()  # type: ignore[no-any-return]


@pytest.fixture
def model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelGraph:
    monkeypatch.chdir(tmp_path)
    return open_folder(llama)


def test_a_stage_that_keeps_the_contract(model: ModelGraph, tmp_path: Path) -> None:
    assert check_stage(load_stage(tmp_path, GOOD), model=model) == []


def test_file_of_a_library_in_a_folder_that_is_gone_is_no_finding(model: ModelGraph, tmp_path: Path) -> None:
    """Python sees nothing of the file until its permissions change, when it is there already."""
    body = (
        "import shutil; place = ELSEWHERE / 'making'; place.mkdir(); os.system(f'touch {place}/unseen'); "
        "(place / 'unseen').chmod(0o600); shutil.rmtree(place)"
    )
    assert check_stage(load_stage(tmp_path, body), model=model) == []
    kept = check_stage(load_stage(tmp_path, body.replace("shutil.rmtree(place)", "1")), model=model)
    assert any("making" in line for line in kept)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, model: ModelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, message = FAULTS[fault]
    monkeypatch.setenv("MINE", "before")
    if fault == "file of an input":
        from gradmap_pipeline import TensorFile

        folder = tmp_path / "base"
        folder.mkdir()
        file = TensorFile.save({"model.norm.weight": torch.ones(32)}, folder / "patch.safetensors")
        model = model.with_patches({"model.norm.weight": file}, "patched")
    stage = load_stage(tmp_path, body)
    try:
        breaches = check_stage(stage, model=model)
    finally:
        monkeypatch.chdir(tmp_path)
        torch.set_grad_enabled(True)
        sys.modules["odd_stage"].release.set()
    assert any(message in line for line in breaches), breaches
    assert all(len(line.splitlines()) == 1 for line in breaches)
    assert len(breaches) <= 3, breaches
    assert not [thread for thread in threading.enumerate() if thread.name == "mine" and thread.join(5)]


def test_memory_beyond_the_given(model: ModelGraph, tmp_path: Path) -> None:
    stage = load_stage(tmp_path, "held = torch.ones(1 << 27)")
    assert check_stage(stage, model=model, memory=resident_bytes() + (1 << 30)) == []
    given = resident_bytes() // 2  # a twentieth more is tolerated, and other tests leave garbage
    breaches = check_stage(stage, model=model, memory=given)
    assert any(line.startswith("it takes ") and "where context.memory is" in line for line in breaches), breaches


@pytest.mark.parametrize(
    ("forecast", "message"),
    [
        ("{'model': inputs['model'].layers}", "forecast() fails where nothing is known of the inputs: AttributeError"),
        ("None", "must return a mapping of output names, got None"),
        ("{'mine': 1}", "forecast() of stage 'do_odd' must return a mapping of its outputs (model, thing), got one of 'mine'"),
        ("{'model': 1}", "must return for output 'model' ModelGraph.Forecast (ModelForecast) or None, got 1"),
    ],
)
def test_forecasts(forecast: str, message: str, model: ModelGraph, tmp_path: Path) -> None:
    assert any(message in line for line in check_stage(load_stage(tmp_path, GOOD, forecast), model=model))


def test_wrong_inputs_are_told(model: ModelGraph, tmp_path: Path) -> None:
    with pytest.raises(GradmapError, match="input 'model' of 'do_odd': Field required"):
        check_stage(load_stage(tmp_path, GOOD))


def test_command_on_a_file(model: ModelGraph, tmp_path: Path) -> None:
    body = "model = model.with_patches(patch(context, torch.ones(64, dtype=torch.bfloat16)), 'patched')"
    load_stage(tmp_path, body)
    result = CliRunner().invoke(app, ["stages", "--check", "odd.py"])
    assert (result.exit_code, result.stdout) == (0, "do_odd: keeps the contract\n"), result.output
    load_stage(tmp_path, "print('x'); thing = Thing(value=random.random())")
    result = CliRunner().invoke(app, ["stages", "--check", "odd.py"])
    assert (result.exit_code, result.stdout) == (2, "do_odd: 2 found\n"), result.output
    assert result.stderr.splitlines() == [
        "error: do_odd: it prints to standard output ('x'); use context.note for what the user should know",
        "error: do_odd: the second run gives another output at 'thing.value'; "
        "take random numbers from a generator with context.seed",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "no_stage"], "no stage named 'no_stage'"),
        (["--check", "prune", "--set", "ratio=1"], "must look like STAGE.OPTION=VALUE with a stage that is checked: prune"),
        (["--check", "prune", "--set", "prune.ratio=2"], "stage 'prune': option 'ratio': found 2"),
        (["--check", "missing.py"], "--check missing.py: there is no such file; name a Python file with stages, or a stage"),
    ],
)
def test_wrong_commands(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["stages", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


NEED_MORE = {"export_gguf", "quantize_llmcompressor", "quantize_torchao", "evaluate_lm_eval"}
"""They need programs, Pythons or tasks that a test does not have."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(load_catalog().stages) - NEED_MORE))
def test_shipped_stages_keep_the_contract(name: str) -> None:
    result = CliRunner().invoke(app, ["stages", "--check", name])
    assert (result.exit_code, result.output) == (0, f"{name}: keeps the contract\n")


def test_what_another_process_has_in_the_making_is_no_fault(tmp_path: Path) -> None:
    lock, other = tmp_path / ".gradmap.partial-0ee98055.lock", tmp_path / "left.txt"
    lock.touch()
    other.touch()
    seen = Seen(changed={lock: None, other: None, tmp_path / ".x.partial-00000000" / "a": (1, 1)})
    assert seen.left_outside(()) == [other]
