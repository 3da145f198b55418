"""A broken plugin takes nothing else down, whatever it raises or prints, and wherever."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
from typer.testing import CliRunner

from gradmap_pipeline import interruptions
from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.streams import plugin_code

PLUGIN = '''
import os, subprocess, sys
from pydantic import BaseModel, model_validator
from gradmap_pipeline import Artifact, Context, Stage, ModelGraph, hookimpl

def act(place):
    if place != PLACE:
        return
    CODE

def recurse():
    recurse()

class Told(Artifact):
    number: int = NUMBER

class Odd(Stage):
    """Act oddly."""
    name = "odd"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        told: Told
    @model_validator(mode="after")
    def check(self):
        act("options")
        return self
    def forecast(self, inputs):
        act("forecast")
        return {}
    def inspect(self, inputs, probe):
        act("inspect")
    def advise(self, inputs):
        act("advise")
        return ()
    def estimate(self, inputs, costs):
        act("estimate")
    def writes(self):
        act("writes")
        return ()
    def run(self, inputs, context):
        act("run")
        return self.Outputs(told=Told())

act("import")

@hookimpl
def gradmap_stages():
    act("hook")
    return [Odd]
'''
RAISED = {
    "sys.exit(3)": "SystemExit: 3",
    "raise KeyboardInterrupt": "KeyboardInterrupt: ",
    "raise GeneratorExit": "GeneratorExit: ",
    "raise BaseException('bare')": "BaseException: bare",
    "recurse()": "RecursionError: maximum recursion depth exceeded",
}
COMMANDS = {
    "options": "check",
    "forecast": "check",
    "advise": "check",
    "writes": "check",
    "inspect": "check",
    "estimate": "plan",
    "run": "run",
}
PRINTING = "print('loud'); os.write(1, b'loud'); subprocess.run(['echo', 'loud'])"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [{"id": "s", "use": "odd"}]})
    )
    return tmp_path


@pytest.fixture
def no_signal(monkeypatch: pytest.MonkeyPatch) -> object:
    """Signals are handled as under the `gradmap` command, and none comes."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        interruptions.note_interruption()
        raise KeyboardInterrupt

    monkeypatch.setattr(interruptions._signals, "has_come", False)
    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


def write_plugin(place: str, code: str, number: int = 1) -> None:
    Path("p.py").write_text(PLUGIN.replace("PLACE", repr(place)).replace("CODE", code).replace("NUMBER", str(number)))


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an installed plugin `stranger` is looked for."""
    information = folder / "site" / "stranger-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[gradmap]\nodd = stranger\n")
    monkeypatch.syspath_prepend(folder / "site")
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return folder / "site" / "stranger.py"


@pytest.mark.parametrize("code", RAISED)
@pytest.mark.parametrize("place", ["import", "hook"])
def test_an_installed_plugin_that_cannot_be_loaded_is_left_out(place: str, code: str, installed: Path, no_signal: object) -> None:
    write_plugin(place, code)
    Path("p.py").rename(installed)
    result = CliRunner().invoke(app, ["stages"])
    assert result.exit_code == 0
    assert "prune" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("left out: plugin stranger: "))
    assert RAISED[code].strip() in line
    assert CliRunner().invoke(app, ["check", "r.yaml"]).exit_code == 2


@pytest.mark.parametrize("code", RAISED)
@pytest.mark.parametrize(("place", "said"), [("import", "cannot be imported"), ("hook", "gradmap_stages() failed")])
def test_a_plugin_file_that_cannot_be_loaded_is_named(place: str, said: str, code: str, folder: Path, no_signal: object) -> None:
    write_plugin(place, code)
    result = CliRunner().invoke(app, ["check", "r.yaml", "--plugin", "p.py"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: plugin 'p.py'")
    assert f"{said}: {RAISED[code]}" in result.stderr


@pytest.mark.parametrize("code", RAISED)
@pytest.mark.parametrize("place", COMMANDS)
def test_whatever_a_stage_raises_is_told_with_step_and_plugin(place: str, code: str, folder: Path, no_signal: object) -> None:
    write_plugin(place, code)
    result = CliRunner().invoke(app, [COMMANDS[place], "r.yaml", "--plugin", "p.py"])
    assert result.exit_code == (4 if place == "run" else 2)
    assert result.stderr.startswith("error: step 's': ")
    assert "stage 'odd' (p.py)" in result.stderr
    assert f"failed: {RAISED[code]}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_signal_still_interrupts(folder: Path, no_signal: object) -> None:
    write_plugin("forecast", "os.kill(os.getpid(), 2)")
    result = CliRunner().invoke(app, ["check", "r.yaml", "--plugin", "p.py"])
    assert (result.exit_code, result.stderr[:18]) == (130, "error: interrupted")


@pytest.mark.parametrize("code", RAISED)
def test_whatever_an_artifact_raises_is_told_with_step_and_plugin(code: str, folder: Path, no_signal: object) -> None:
    write_plugin("nowhere", "pass")
    assert CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "p.py"]).exit_code == 0
    write_plugin("artifact", code)
    check = '    @model_validator(mode="after")\n    def look(self):\n        act("artifact")\n        return self\n'
    Path("p.py").write_text(Path("p.py").read_text().replace("\nclass Odd", f"{check}\nclass Odd"))
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "p.py"])
    assert result.exit_code == 4
    assert result.stderr.startswith("error: step 's': stage 'odd' (p.py) failed: ")
    assert RAISED[code] in result.stderr


def test_stages_check_tells_what_run_raises(folder: Path, no_signal: object) -> None:
    write_plugin("run", "sys.exit(3)")
    result = CliRunner().invoke(app, ["stages", "--check", "p.py"])
    assert result.exit_code == 2
    assert "odd: run() fails at line 9 of p.py: SystemExit: 3" in result.stderr


def test_a_keyboard_interrupt_that_a_stage_raises_in_another_python_is_a_failure(folder: Path, no_signal: object) -> None:
    write_plugin("run", "raise KeyboardInterrupt")
    recipe = json.loads(Path("r.yaml").read_text())
    recipe["steps"][0]["run"] = {"python": sys.executable}
    Path("r.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "p.py"])
    assert result.exit_code == 4
    assert "step 's': stage 'odd' (p.py) failed: KeyboardInterrupt: " in result.stderr


def test_an_unreadable_list_of_plugins_hides_no_others(folder: Path, installed: Path) -> None:
    (folder / "site" / "stranger-1.0.dist-info" / "entry_points.txt").write_text("[gradmap]\nno value here\n")
    result = CliRunner().invoke(app, ["stages"])
    assert result.exit_code == 0
    assert "prune" in result.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "place", ["import", "hook", *(place if place == "run" else pytest.param(place, marks=pytest.mark.slow) for place in COMMANDS)]
)
def test_what_a_plugin_prints_is_not_on_standard_output(place: str, folder: Path) -> None:
    """Nor what it writes below Python, or another process that it starts."""
    write_plugin(place, PRINTING)
    command = COMMANDS.get(place, "check")
    option = ["--json"] if command != "check" else []
    arguments = [command, "r.yaml", *option] if place in COMMANDS else ["schema"]
    done = subprocess.run(
        [sys.executable, "-m", "gradmap_pipeline", *arguments, "--plugin", "p.py"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "loud" not in done.stdout
    assert done.stderr.count("loud") >= 3
    if command == "check" and place in COMMANDS:
        assert done.stdout == "r.yaml: no problems in 1 step\n"
    else:
        assert all(json.loads(line) for line in (done.stdout.splitlines() if command == "run" else [done.stdout]))


@pytest.mark.parametrize("place", ["import", "hook", "forecast", "run"])
def test_what_a_plugin_prints_is_not_among_the_lines_of_a_run(place: str, folder: Path) -> None:
    write_plugin(place, PRINTING, number=2)
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "p.py"])
    assert result.exit_code == 0
    assert "loud" not in result.stdout
    assert "s: done (" in result.stdout
    assert "loud" in result.stderr
    listed = CliRunner().invoke(app, ["stages", "odd", "--plugin", "p.py"])
    assert "loud" not in listed.stdout


def test_quiet_keeps_what_a_plugin_prints_in_the_log(folder: Path) -> None:
    write_plugin("run", "print('loud')", number=3)
    result = CliRunner().invoke(app, ["run", "r.yaml", "--quiet", "--plugin", "p.py"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert "loud" in (folder / ".gradmap" / "quiet.log").read_text()


def test_streams_that_a_plugin_replaces_come_back() -> None:
    ours = sys.stdout, sys.stderr
    with plugin_code():
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    assert (sys.stdout, sys.stderr) == ours
