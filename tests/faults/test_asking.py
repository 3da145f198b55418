"""Whatever a method of a stage returns or raises: the step, the plugin and the method are named, with what was returned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app

pytestmark = pytest.mark.full

PLUGIN = '''
import os, sys
from pathlib import Path
from pydantic import BaseModel
from gradmap_pipeline import Artifact, Estimate, ModelGraph, Stage, StageError, hookimpl

AT_IMPORT

class Told(Artifact):
    number: int = 1

class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no words")
    __repr__ = __str__

class Refusal(StageError):
    __str__ = Unprintable.__str__

def fail(error):
    raise error

class Odd(Stage):
    """Answer oddly."""
    name = "odd"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        told: Told
    def run(self, inputs, context):
        return self.Outputs(told=Told())

class Answers(Odd):
    """Answer oddly."""
    def METHOD(self, *arguments):
        ANSWER

@hookimpl
def gradmap_stages():
    return [Answers]
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [{"id": "s", "use": "odd"}]})
    )
    return tmp_path


def write_plugin(method: str = "advise", answer: str = "return ()", at_import: str = "") -> None:
    text = PLUGIN.replace("METHOD", method).replace("ANSWER", answer).replace("AT_IMPORT", at_import)
    Path("p.py").write_text(text)


def gradmap(command: str, method: str, answer: str) -> tuple[int, str]:
    write_plugin(method, answer)
    result = CliRunner().invoke(app, [command, "r.yaml", "--plugin", "p.py"])
    return result.exit_code, result.stderr


PATHS = "a tuple of pathlib.Path"
ANSWERS = [
    ("check", "writes", "return None", PATHS, "None"),
    ("check", "writes", "return 'out'", PATHS, "'out'"),
    ("check", "writes", "return ['out']", PATHS, "['out']"),
    ("check", "writes", "return 3", PATHS, "3"),
    ("check", "writes", "yield Path('out')", PATHS, "a generator"),
    ("check", "writes", "return Path('out')", PATHS, "a PosixPath"),
    ("check", "forecast", "return [('told', 1)]", "a mapping of output names", "[('told', 1)]"),
    ("check", "forecast", "return {1: 2}", "a mapping of output names", "{1: 2}"),
    ("check", "advise", "return None", "a list of texts", "None"),
    ("check", "advise", "return 'one fact'", "a list of texts", "'one fact'"),
    ("check", "advise", "return [1]", "a list of texts", "[1]"),
    ("check", "output_types", "return {'told': 'Told'}", "a mapping of output names to classes of artifacts", "{'told': 'Told'}"),
    ("run", "inspect", "return False", "nothing, and raise an OptionError or ModelError to refuse", "False"),
    ("plan", "inspect", "return ['no']", "nothing, and raise an OptionError or ModelError to refuse", "['no']"),
    ("plan", "estimate", "return 5.0", "an Estimate or None", "5.0"),
    ("plan", "estimate", "return Estimate('much')", "an Estimate or None", "an Estimate"),
    ("plan", "estimate", "return Estimate(seconds=float('inf'))", "an Estimate or None", "an Estimate"),
    ("plan", "estimate", "yield Estimate()", "an Estimate or None", "a generator"),
]


@pytest.mark.parametrize(("command", "method", "answer", "wanted", "shown"), ANSWERS)
def test_an_answer_of_the_wrong_type_is_told(command: str, method: str, answer: str, wanted: str, shown: str, folder: Path) -> None:
    message = f"error: step 's': {method}() of stage 'odd' (p.py) must return {wanted}, got {shown}\n"
    assert gradmap(command, method, answer) == (2, message)


@pytest.mark.parametrize(
    ("answer", "shown"), [("return None", "None"), ("yield 1", "a generator"), ("return 'x' * 999", "a str"), ("return 1", "1")]
)
def test_a_result_of_the_wrong_type_is_told(answer: str, shown: str, folder: Path) -> None:
    message = f"error: step 's': run() of stage 'odd' (p.py) must return its Outputs, got {shown}\n"
    assert gradmap("run", "run", answer) == (4, message)


@pytest.mark.parametrize("method", ["writes", "forecast", "advise", "output_types"])
@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_an_error_without_words_is_told_with_its_step(command: str, method: str, folder: Path) -> None:
    code, message = gradmap(command, method, "raise Unprintable")
    words = "Unprintable: its message is not known, as __str__ fails with ValueError"
    assert (code, message) == (2, f"error: step 's': {method}() of stage 'odd' (p.py) failed: {words}\n")


@pytest.mark.parametrize(("error", "named"), [("Unprintable", "failed: Unprintable: its message"), ("Refusal", "its message")])
def test_an_error_without_words_of_a_run_is_told_with_its_step(error: str, named: str, folder: Path) -> None:
    code, message = gradmap("run", "run", f"raise {error}")
    assert code == 4
    assert message.startswith("error: step 's': ")
    assert f"{named} is not known, as __str__ fails with ValueError" in message.replace("its message its message", "its message")
    assert message.count("\n") == 1


def test_stages_check_tells_it_too(folder: Path) -> None:
    write_plugin("writes", "return None")
    result = CliRunner().invoke(app, ["stages", "--check", "p.py"])
    assert result.exit_code == 2
    assert "odd: writes() of stage 'odd' must return a tuple of pathlib.Path, got None" in result.stderr


SPOILERS = [
    "os.close(1)",
    "sys.stdout.close()",
    "sys.stdout.detach()",
    "sys.stdout.buffer.raw.close()",
    "sys.stdout = sys.stderr = None",
    "sys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2)",
]


def run_apart(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "gradmap_pipeline", *arguments, "--plugin", "p.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("spoiler", [SPOILERS[0], *(pytest.param(spoiler, marks=pytest.mark.slow) for spoiler in SPOILERS[1:])])
def test_a_plugin_that_closes_standard_output_when_imported_changes_nothing(spoiler: str, folder: Path) -> None:
    write_plugin(at_import=spoiler)
    assert run_apart("check", "r.yaml") == (0, "r.yaml: no problems in 1 step\n", "")
    code, output, errors = run_apart("schema")
    assert (code, errors) == (0, "")
    assert json.loads(output)["title"]


@pytest.mark.parametrize("option", [pytest.param("", marks=pytest.mark.slow), "--json"])
def test_a_plugin_that_closes_standard_output_in_a_run_changes_nothing(option: str, folder: Path) -> None:
    for number, spoiler in enumerate(SPOILERS[::3] if option else SPOILERS[2:]):
        write_plugin("run", f"{spoiler}; return self.Outputs(told=Told(number={number}))")
        code, output, errors = run_apart("run", "r.yaml", *option.split())
        assert (code, errors) == (0, ""), spoiler
        assert ('{"event": "run_finished"' if option else "s: done (") in output, spoiler
