"""Whatever is raised, wherever: one message, one of our exit codes, a kept traceback where nobody foresaw it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline import StageError
from gradmap_pipeline.cli import app
from gradmap_pipeline.cli.ending import endings

PLUGIN = '''
import os, sys
from pydantic import BaseModel, Field
from gradmap_pipeline import Artifact, ModelGraph, Stage, hookimpl

class Odd(BaseException):
    pass

class Bad(Artifact):
    def files_by_path(self):
        if os.path.exists("again"):
            raise ZeroDivisionError("outside of any stage")
        return {}

def recurse():
    return recurse()

def act(wanted, where):
    if wanted.startswith(where + ":"):
        exec(wanted.partition(":")[2], globals())

class Fail(Stage):
    """Fail."""
    name = "fail"
    how: str = Field("", description="Where and how.")
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        bad: Bad
    def forecast(self, inputs):
        act(self.how, "forecast")
        return {}
    def inspect(self, inputs, probe):
        act(self.how, "inspect")
    def estimate(self, inputs, costs):
        act(self.how, "estimate")
    def run(self, inputs, context):
        act(self.how, "run")
        return self.Outputs(bad=Bad())

@hookimpl
def gradmap_stages():
    return [Fail]
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.py").write_text(PLUGIN)
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [{"use": "fail"}]}))
    return tmp_path


def gradmap(command: str, how: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, "r.yaml", "--plugin", "p.py", "--set", f"fail.how={json.dumps(how)}", *arguments])


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("sys.exit(0)", 4, "stage 'fail' (p.py) failed: SystemExit: 0; traceback in "),
        ("sys.exit('enough')", 4, "stage 'fail' (p.py) failed: SystemExit: enough; traceback in "),
        ("raise GeneratorExit", 4, "stage 'fail' (p.py) failed: GeneratorExit: ; traceback in "),
        ("raise StopIteration", 4, "stage 'fail' (p.py) failed: StopIteration: ; traceback in "),
        ("raise Odd('odd')", 4, "stage 'fail' (p.py) failed: Odd: odd; traceback in "),
        ("recurse()", 4, "stage 'fail' (p.py) failed: RecursionError: maximum recursion depth exceeded"),
        ("raise MemoryError", 3, "stage 'fail' ran out of memory: MemoryError; close other programs"),
        ("raise KeyboardInterrupt", 130, "interrupted; what is finished is kept"),
    ],
)
def test_whatever_a_stage_raises(folder: Path, code: str, exit_code: int, message: str) -> None:
    result = gradmap("run", f"run:{code}")
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output
    if exit_code == 4:
        assert "Traceback" in (folder / ".gradmap" / "traceback.txt").read_text()
    assert not list((folder / ".gradmap" / "steps").iterdir())


@pytest.mark.parametrize(
    ("command", "where", "message"),
    [
        ("check", "forecast", "step 'fail': forecast() of stage 'fail' (p.py) failed: SystemExit: 0"),
        ("run", "inspect", "step 'fail': inspect() of stage 'fail' (p.py) failed: SystemExit: 0"),
        ("plan", "estimate", "step 'fail': estimate() of stage 'fail' (p.py) failed: SystemExit: 0"),
    ],
)
def test_whatever_a_stage_raises_before_it_runs(folder: Path, command: str, where: str, message: str) -> None:
    result = gradmap(command, f"{where}:sys.exit(0)")
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")


def test_shortage_before_a_stage_runs_is_a_shortage(folder: Path) -> None:
    result = gradmap("run", "inspect:raise MemoryError")
    assert result.exit_code == 3
    assert "ran out of memory: MemoryError" in result.stderr


LOSSES = {"store": "'.gradmap'", "step": "next(p for p in Path('.gradmap/steps').glob('.fail-*') if p.is_dir())"}


@pytest.mark.parametrize("then", ["", "; raise ValueError('then')", "; context.remember('a', lambda: 1)"])
@pytest.mark.parametrize("lost", LOSSES)
def test_a_stage_that_deletes_what_it_works_in_is_told_and_leaves_nothing(lost: str, then: str, folder: Path) -> None:
    text = PLUGIN.replace('act(self.how, "run")', f"import shutil; from pathlib import Path; shutil.rmtree({LOSSES[lost]}){then}")
    (folder / "p.py").write_text(text)
    result = gradmap("run", "")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: step 'fail': stage 'fail': the ")
    assert f"{folder}/.gradmap" in result.stderr
    assert "' was deleted while the step ran, by its stage or by another program" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(folder.glob(".gradmap/steps/*"))
    (folder / "p.py").write_text(PLUGIN)
    assert gradmap("run", "").exit_code == 0


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "raise GeneratorExit", "raise BaseException('no')"])
def test_plugin_that_ends_the_process_when_imported(folder: Path, code: str) -> None:
    (folder / "p.py").write_text(code)
    result = gradmap("check", "")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: plugin 'p.py' cannot be imported: ")


def test_what_nobody_foresaw_leaves_a_traceback_in_the_store(folder: Path) -> None:
    assert gradmap("run", "").exit_code == 0
    (folder / "again").touch()
    result = gradmap("run", "")
    file = folder / ".gradmap" / "traceback.txt"
    said = f"ZeroDivisionError: outside of any stage, which nothing here foresees; traceback in {file}"
    assert (result.exit_code, result.stderr) == (4, f"error: {said}\n")
    assert "in files_by_path" in file.read_text()
    again = gradmap("run", "", "--json")
    event = json.loads(again.stdout.splitlines()[-1])
    assert event.pop("time")
    assert event == {"event": "error", "exit_code": 4, "message": said, "where": None}
    assert again.stderr == ""


@pytest.mark.parametrize(
    "error", [AssertionError("never"), SystemExit(7), GeneratorExit(), StopIteration(), OSError("without a number")]
)
def test_what_nobody_foresaw_without_a_store(error: BaseException, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end, endings(None, tmp_path / "no-store"):
        raise error
    assert end.value.code == 4
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {type(error).__name__}: {error}, which nothing here foresees; traceback in ")
    file = Path(said.rpartition("traceback in ")[2])
    assert "Traceback" in file.read_text()
    file.unlink()


def test_error_raised_from_a_shortage_is_the_shortage(capsys: pytest.CaptureFixture[str]) -> None:
    failure = StageError("the folder cannot be written")
    failure.__cause__ = OSError(28, "No space left on device", "/data/model.safetensors")
    with pytest.raises(SystemExit) as end, endings():
        raise failure
    assert end.value.code == 3
    said = capsys.readouterr().err
    assert said.startswith(
        "error: ran out of disk: [Errno 28] No space left on device: '/data/model.safetensors'; free space there"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'RECIPE'; see gradmap run --help"),
        (["run", "r.yaml", "--frob"], "No such option"),
        (["frob"], "No such command 'frob'"),
        (["run", "r.yaml", "--dtype", "[/x]"], "Invalid value for '--dtype': found '[/x]', accepted: float32, bfloat16, float16"),
    ],
)
def test_usage_errors_are_told_like_all_others(folder: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    (event,) = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert (event["event"], event["exit_code"], as_json.exit_code, as_json.stderr) == ("error", 2, 2, "")


def test_plan_tells_an_error_as_json(folder: Path) -> None:
    result = gradmap("plan", "forecast:sys.exit(0)", "--json")
    assert json.loads(result.stdout)["exit_code"] == result.exit_code == 2


def test_entry_points_are_the_same() -> None:
    import gradmap_pipeline.cli
    from gradmap_pipeline.cli import commands

    assert gradmap_pipeline.cli.app is commands.app
    with pytest.raises(AttributeError):
        _ = gradmap_pipeline.cli.frob  # type: ignore[attr-defined]
    assert "gradmap_pipeline.cli" in sys.modules


@pytest.mark.full
@pytest.mark.parametrize(("how", "code"), [("os._exit(7)", 7), ("os.kill(os.getpid(), 9)", -9)])
def test_a_process_ended_by_a_plugin_leaves_a_whole_store(how: str, code: int, folder: Path) -> None:
    command = [sys.executable, "-m", "gradmap_pipeline", "run", "r.yaml", "--plugin", "p.py", "--set", f"fail.how=run:{how}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    result = gradmap("run", "")
    assert result.exit_code == 0
    assert [path.name[:5] for path in (folder / ".gradmap" / "steps").iterdir()] == ["fail-"]
