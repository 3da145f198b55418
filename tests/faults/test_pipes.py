"""Readers that go, streams that are closed, disks that are full, and others that print: standard output is ours alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app

pytestmark = [pytest.mark.full, pytest.mark.skipif(sys.platform == "win32", reason="shell redirections")]

PLUGIN = '''
import ctypes, os, subprocess, sys, warnings
from pydantic import BaseModel
from gradmap_pipeline import Artifact, ModelGraph, Stage, hookimpl

print("printed on import")

class Told(Artifact):
    loss: float = 1.5

class Prints(Stage):
    """Prints."""
    name = "prints"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        told: Told
    def run(self, inputs, context):
        print("printed by Python")
        try:
            os.write(1, b"written below Python\\n")
        except OSError:
            pass  # its reader has gone
        ctypes.CDLL(None).puts(b"put by C")
        ctypes.CDLL(None).fflush(None)
        subprocess.run(["echo", "printed by a child"])
        warnings.warn("warned")
        return self.Outputs(told=Told())

@hookimpl
def gradmap_stages():
    return [Prints]
'''
OTHERS = ("printed on import", "printed by Python", "written below Python", "put by C", "printed by a child", "warned")
GRADMAP = f"{sys.executable} -m gradmap_pipeline"


@pytest.fixture
def folder(tmp_path: Path, llama: Path) -> Path:
    (tmp_path / "p.py").write_text(PLUGIN)
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [{"use": "prints"}]}))
    return tmp_path


def shell(folder: Path, line: str, **variables: str) -> tuple[int, str, str]:
    """Exit code of the first program of the line, and what arrives."""
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_json_quiet_and_schema_are_ours_alone(folder: Path) -> None:
    code, out, err = shell(folder, f"{GRADMAP} run r.yaml --plugin p.py --json")
    assert code == 0, err
    events = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["run_started", "step_started", "computing", "step_finished", "run_finished"]
    assert events[3]["outputs"]["told"]["loss"] == 1.5
    assert all(text in err for text in OTHERS), err
    code, out, err = shell(folder, f"{GRADMAP} run r.yaml --plugin p.py --quiet --store other")
    assert (code, out, err) == (0, "", "")
    log = (folder / "other" / "quiet.log").read_text()
    assert all(text in log for text in OTHERS), log
    code, out, err = shell(folder, f"{GRADMAP} schema --plugin p.py")
    assert code == 0
    assert json.loads(out)["type"] == "object"
    assert err == "printed on import\n"


def test_the_same_inside_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["plan", "r.yaml", "--plugin", "p.py", "--json"])
    assert result.exit_code == 0, result.stderr
    assert "steps" in json.loads(result.stdout)
    assert "printed on import" in result.stderr


@pytest.mark.parametrize(
    "ending",
    ["--json | head -1", *(pytest.param(ending, marks=pytest.mark.slow) for ending in ("| true", ">&- 2>&-"))],
)
def test_a_run_goes_on_when_its_reader_has_gone(ending: str, folder: Path) -> None:
    code, _, err = shell(folder, f"{GRADMAP} run r.yaml --plugin p.py {ending}")
    assert code == 0, err
    assert len(list((folder / ".gradmap" / "steps").glob("prints-*"))) == 1


@pytest.mark.parametrize(
    "command", ["stages", "schema", "--help", pytest.param("check r.yaml --plugin p.py", marks=pytest.mark.slow)]
)
def test_listing_commands_end_quietly(command: str, folder: Path) -> None:
    printed = "printed on import\n" if "p.py" in command else ""  # by the plugin
    assert shell(folder, f"{GRADMAP} {command} | true") == (0, "", printed)
    assert shell(folder, f"{GRADMAP} {command} >&-") == (0, "", printed)


@pytest.mark.slow
def test_a_plan_ends_quietly(folder: Path) -> None:
    assert shell(folder, f"{GRADMAP} plan r.yaml --plugin p.py | true") == (0, "", "printed on import\n")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["stages", "--version", "run r.yaml --plugin p.py", "run r.yaml --plugin p.py --json"])
def test_full_disk_under_standard_output(command: str, folder: Path) -> None:
    code, _, err = shell(folder, f"{GRADMAP} {command} > /dev/full")
    assert code == 3
    assert err.endswith("error: standard output cannot be written: No space left on device; free space on its disk\n")


def test_errors_that_nobody_can_read(folder: Path) -> None:
    for ending in ("2>&-", "2>/dev/full", "2> >(true)"):
        code, out, err = shell(folder, f"{GRADMAP} stages nothing {ending}")
        assert (code, out, err) == (2, "", "")


def test_files_never_get_the_number_of_a_closed_stream(folder: Path) -> None:
    opened = "print(os.open('f', os.O_CREAT) > 2, file=open('n', 'w'))"
    code = f"import os; from gradmap_pipeline.machine.streams import guard_streams; guard_streams(); {opened}"
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], cwd=folder, check=True)
    assert (folder / "n").read_text() == "True\n"


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, pytest.param(C_LOCALE, marks=pytest.mark.slow)])
def test_characters_that_the_encoding_lacks(variables: dict[str, str], folder: Path, llama: Path) -> None:
    recipe = {"version": 1, "model": {"path": str(llama)}, "steps": [{"use": "prints", "id": "prints"}]}
    (folder / "ö漢.yaml").write_text(json.dumps(recipe))
    for command in ("check ö漢.yaml --plugin p.py", "run ö漢.yaml --plugin p.py", "stages evaluate", "check 漢 --plugin p.py"):
        code, out, err = shell(folder, f"{GRADMAP} {command}", **variables)
        assert code == (2 if command.startswith("check 漢") else 0), err
        assert (out + err).isascii()
    assert "\\u" in err


@pytest.mark.slow
def test_what_transformers_says_is_a_note(folder: Path) -> None:
    """Each text once, and nothing of it on standard error."""
    warns = "from transformers.utils import logging\n        [logging.get_logger().warning('it is odd\\n here') for _ in range(2)]"
    (folder / "p.py").write_text(PLUGIN.replace('print("printed by Python")', warns))
    assert shell(folder, f"{GRADMAP} run r.yaml --plugin p.py --quiet") == (0, "", "")
    code, out, err = shell(folder, f"{GRADMAP} run r.yaml --plugin p.py --store other")
    assert (code, out.count("transformers: it is odd here\n")) == (0, 1), out
    assert "odd" not in err
    code, out, err = shell(folder, f"{GRADMAP} run r.yaml --plugin p.py --store third --json")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["text"] for event in events if event["event"] == "note"] == ["transformers: it is odd here"]
