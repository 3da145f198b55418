"""Stages in another Python: what travels there and back, and what is said when something goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline import Environment, StageError
from gradmap_pipeline.cli import app
from gradmap_pipeline.machine import environment
from gradmap_pipeline.machine.environment import Workplace

pytestmark = pytest.mark.full

PLUGIN = '''
import os, signal, sys
from pathlib import Path
from pydantic import BaseModel, Field
from gradmap_pipeline import *
from gradmap_pipeline import Artifact


class Told(Artifact):
    process: int
    parent: int
    file: TensorFile
    layers: int
    facts: dict[str, str | int | None]


class Probe(Stage):
    """Say where it runs."""

    name = "probe"
    environment = ENVIRONMENT
    act: str = Field("nothing", description="What to do.")
    number: int = Field(0, description="Makes the step another one.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        told: Told

    def run(self, inputs, context):
        act(self.act)
        import torch

        print("from a library")
        context.note("at work")
        with context.progress("count", 2, "sheep") as advance:
            kept = context.remember({"what": "sheep"}, lambda: count(context, advance))
        facts = {"kept": kept, "current": os.getcwd(), "threads": torch.get_num_threads(), "path": os.environ.get("PYTHONPATH"),
                 "lineage": len(context.lineage), "step": context.step,
                 "memory": context.memory, "seed": context.seed, "dtype": context.dtype}
        file = TensorFile.save({"x": torch.arange(3)}, context.folder / "x.safetensors")
        layers = len(inputs.model.layers)
        return self.Outputs(told=Told(process=os.getpid(), parent=os.getppid(), file=file, layers=layers, facts=facts))


def count(context, advance):
    context.note("counting")
    advance()
    advance()
    return 2


def act(what):
    if what == "stage error":
        raise StageError("the sheep are gone")
    if what == "capacity":
        raise CapacityError("no room for sheep")
    if what == "option":
        raise OptionError("act", "cannot be this")
    if what == "memory":
        raise MemoryError("sheep too large")
    if what == "crash":
        raise ZeroDivisionError("sheep by zero")
    if what == "exit":
        print("last words", file=sys.stderr, flush=True)
        os._exit(7)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


@hookimpl
def gradmap_stages():
    return [Probe]
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    """A folder with the plugin and a recipe that runs it in this very Python, as another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    (tmp_path / "p.py").write_text(PLUGIN.replace("ENVIRONMENT", "None"))
    step = {"use": "probe", "run": {"python": sys.executable}}
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "seed": 5, "model": {"path": str(llama)}, "steps": [step]}))
    return tmp_path


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--plugin", "p.py"])


def run_told(*arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the stage tells, and all events."""
    result = gradmap("run", "r.yaml", "--json", *arguments)
    assert result.exit_code == 0, result.stdout
    events = [json.loads(line) for line in result.stdout.splitlines()]
    return next(event["outputs"]["told"] for event in events if event["event"] == "step_finished"), events


def progress(events: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(event["description"], event["done"], event["total"]) for event in events if event["event"] == "progress"]


def test_stage_runs_in_another_process_and_all_else_is_the_same(folder: Path) -> None:
    import os

    told, events = run_told("--threads", "1", "--memory", "3GiB", "--dtype", "bfloat16")
    assert told["process"] != os.getpid() == told["parent"]
    assert told["layers"] == 4
    facts = told["facts"]
    assert facts["memory"] < 3 * 2**30, "what this process holds is taken off"
    assert {name: facts[name] for name in ("kept", "current", "threads", "path", "lineage", "step", "seed", "dtype")} == {
        "kept": 2,
        "current": str(folder),
        "threads": 1,
        "path": None,
        "lineage": 0,
        "step": "probe",
        "seed": 5,
        "dtype": "bfloat16",
    }
    assert Path(told["file"]["path"]).is_file()
    assert Path(told["file"]["path"]).is_relative_to(folder / ".gradmap" / "steps")
    assert progress(events) == [("count", 0, 2)]
    assert (folder / ".gradmap" / "stage.log").read_text() == "from a library\n"


def test_results_and_units_are_kept(folder: Path) -> None:
    first, _ = run_told()
    again, events = run_told()
    assert again == first
    assert next(event["cached"] for event in events if event["event"] == "step_finished")
    _, events = run_told("--set", "probe.number=1")
    assert progress(events) == [("count", 0, 2)], "the unit is not computed again"


class Recorder:
    """A reporter that notes what happens."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def __getattr__(self, _name: str) -> Any:
        return lambda *arguments: self.said.extend(arguments)

    def note(self, step: str, text: str) -> None:
        self.said.append(text)

    def progress(self, event: Any) -> None:
        self.said.append((event.description, event.done, event.total, event.unit))

    def progress_ended(self, step: str, description: str) -> None:
        self.said.append(f"{description} ended")


def test_what_the_stage_tells_arrives_in_order(folder: Path) -> None:
    from gradmap_pipeline.machine.machine import Machine
    from gradmap_pipeline.recipe.catalog import load_catalog
    from gradmap_pipeline.recipe.plan import make_plan
    from gradmap_pipeline.recipe.recipe import load_recipe
    from gradmap_pipeline.run.runner import run_plan
    from gradmap_pipeline.run.store import Store

    recorder = Recorder()
    plan = make_plan(load_recipe(folder / "r.yaml"), load_catalog([folder / "p.py"]))
    run_plan(plan, Store(folder / "store"), Machine(), recorder)
    told = [said for said in recorder.said if isinstance(said, str | tuple)]
    counts = [("count", done, 2, "sheep") for done in range(3)]
    assert told == ["at work", counts[0], "counting", *counts[1:], "count ended"]


@pytest.mark.parametrize(
    ("act", "code", "message"),
    [
        ("stage error", 4, "the sheep are gone"),
        ("capacity", 3, "no room for sheep"),
        ("option", 4, "cannot be this"),
        ("memory", 3, "stage 'probe' ran out of memory: sheep too large; close other programs"),
        ("crash", 4, "stage 'probe' (p.py) failed: ZeroDivisionError: sheep by zero; traceback in "),
        ("exit", 4, "the process of the stage ended with code 7: last words; what it printed is in "),
        ("killed", 3, "the process of the stage was killed by signal 9, as the system does when memory runs out; what it printed"),
    ],
)
def test_failures_arrive_as_if_it_ran_here(folder: Path, act: str, code: int, message: str) -> None:
    result = gradmap("run", "r.yaml", "--set", f"probe.act={act}")
    assert result.exit_code == code, result.output
    assert f"step 'probe': {message}" in " ".join(result.stderr.split()), result.stderr
    assert not any((folder / ".gradmap" / "steps").iterdir())
    if act == "crash":
        assert "ZeroDivisionError: sheep by zero" in (folder / ".gradmap" / "traceback.txt").read_text()
        assert "in act" in (folder / ".gradmap" / "traceback.txt").read_text()


def test_python_that_is_not_there_is_found_by_check(folder: Path) -> None:
    recipe = (folder / "r.yaml").read_text().replace(json.dumps(sys.executable), '"no/python"')
    (folder / "r.yaml").write_text(recipe)
    result = gradmap("check", "r.yaml")
    assert result.exit_code == 2
    assert "'no/python' is not a program; give the path of a Python, as in `run: {python: venv/bin/python}`" in result.stderr
    assert result.stderr.startswith("error: r.yaml:1:")


def test_given_python_must_have_what_the_stage_needs(folder: Path) -> None:
    asked = 'Environment(("pytest>=1", "torch<2", "sheep==1.0"))'
    (folder / "p.py").write_text(PLUGIN.replace("ENVIRONMENT", asked))
    result = gradmap("check", "r.yaml")
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "lacks what the stage needs (torch is " in said
    assert f"needed: torch<2; sheep is missing, needed: sheep==1.0): {sys.executable} -m pip install 'torch<2' 'sheep==1.0'" in said


PROGRAMS = {
    "fails": ("#!/bin/sh\necho no such thing >&2\nexit 3\n", "does not run as a Python: no such thing"),
    "fails silently": ("#!/bin/sh\nexit 3\n", "does not run as a Python: it ended with code 3"),
    "says nothing": ("#!/bin/sh\n", "does not run as a Python: it does not say which Python it is"),
    "says other things": ("#!/bin/sh\necho '[1]'\n", "does not run as a Python: [1]"),
    "text": ("only words", "Exec format error"),
    "hangs": ("#!/bin/sh\necho started\nsleep 600 &\nsleep 600\n", "it has not answered within 1 seconds"),
    "leaves another": ("#!/bin/sh\nsleep 600 &\n", "it has not answered within 1 seconds"),
    "prints without end": ("#!/bin/sh\nexec yes\n", "it has not answered within 1 seconds"),
    "waits for input": ("#!/bin/sh\ncat\n", "does not run as a Python: it does not say which Python it is"),
    "old": ('#!/bin/sh\necho \'{"python": [3, 8], "versions": {}}\'\n', "is Python 3.8"),
    "bare": ('#!/bin/sh\nexec PYTHON -I -S "$@"\n', "lacks what the stage needs (pluggy is missing; psutil is missing; "),
}


@pytest.mark.parametrize(("case", "command"), [*((case, "check") for case in PROGRAMS), ("bare", "plan"), ("hangs", "run")])
def test_program_that_is_no_python_for_the_stage(case: str, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = PROGRAMS[case]
    monkeypatch.setattr(environment, "_PATIENCE", 1.0 if "1 seconds" in message else 60.0)
    program = folder / "program"
    program.write_text(content.replace("PYTHON", sys.executable))
    program.chmod(0o755)
    (folder / "r.yaml").write_text((folder / "r.yaml").read_text().replace(json.dumps(sys.executable), json.dumps(str(program))))
    started = time.monotonic()
    result = gradmap(command, "r.yaml")
    assert time.monotonic() - started < 30
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert said.startswith("error: r.yaml:1:")
    assert f": step 'probe': '{program}' " in said
    assert message in said
    advice = f"{program} -m pip install 'pluggy'" if case == "bare" else "give the path of a Python 3.10 or later that has "
    assert advice in said
    assert said.count("error: ") == 1
    assert not (folder / ".gradmap").exists() or not any((folder / ".gradmap").rglob("*.txt"))


def test_a_module_of_the_current_folder_does_not_answer_for_a_python(folder: Path) -> None:
    (folder / "json.py").write_text("raise SystemExit(5)")
    assert gradmap("check", "r.yaml").exit_code == 0


def make_wheel(folder: Path) -> None:
    """A distribution `sheep` 1.0 with one module."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "sheep-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sheep.py", "legs = 4\n")
        wheel.writestr("sheep-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sheep\nVersion: 1.0\n")
        wheel.writestr("sheep-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("sheep-1.0.dist-info/RECORD", "")


def test_managed_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(environment, "_PINNED", ("torch",))
    root = tmp_path / "environments"
    root.mkdir()
    told: list[str] = []
    place = Workplace(Environment(("sheep==1.0",)), root)
    place.prepare(told.append)
    assert len(told) == 1
    assert told[0].startswith("makes a virtual environment with sheep==1.0 in ")
    code = "import sheep, sys; print(sheep.legs, sys.prefix)"
    done = subprocess.run([str(place.executable), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", str(place.executable.parent.parent)]
    place.prepare(told.append)
    assert len(told) == 1, "it is there"

    lacking = Workplace(Environment(("goats==2.0",)), root)
    with pytest.raises(
        StageError, match=r"pip could not install what the stage needs: No matching distribution found for goats==2\.0"
    ):
        lacking.prepare(told.append)
    assert sorted(item.name for item in root.iterdir()) == sorted([place.executable.parent.parent.name, "pip.log"])


def test_environments_differ_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Environment(("llmcompressor==0.14.0",))
    assert first.digest == Environment(("llmcompressor==0.14.0",)).digest
    assert first.digest != Environment(("llmcompressor==0.14.1",)).digest
    assert "torch" in first.pins
    assert "torch" not in Environment(("torch==2.9",)).pins
    before = first.digest
    monkeypatch.setattr(environment, "version", lambda name: "9.9+cpu")
    assert first.pins["torch"] == "9.9"
    assert first.digest != before


def test_parallel_stages_cannot_have_an_environment() -> None:
    from pydantic import BaseModel

    from gradmap_pipeline import Stage
    from gradmap_pipeline.errors import PluginError

    with pytest.raises(PluginError, match="stage 'both' is parallel and has an environment; one process runs there"):

        class Both(Stage):
            """Both."""

            name = "both"
            parallel = True
            environment = Environment(())

            class Inputs(BaseModel):
                pass

            class Outputs(BaseModel):
                pass
