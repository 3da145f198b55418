"""What the command line names to read or verify: regular files, standard input and pipes; all else is refused at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.machine import input_files

RECIPE = "version: 1\nmodel: {builtin: docs-llama}\nsteps:\n  - use: evaluate\n    with: {dataset: {builtin: heldout}}\n"
COMMANDS = ("check", "plan", "run", "compare")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(input_files, "_PATIENCE", 0.5)
    Path("r.yaml").write_text(RECIPE)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    return tmp_path


def refused(message: str, *arguments: str) -> None:
    started = time.monotonic()
    result = CliRunner().invoke(app, list(arguments))
    assert time.monotonic() - started < 30
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), (arguments, result.stderr)
    assert message in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_that_is_no_file(command: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name, message in {
            "": "Invalid value for 'RECIPE",
            " ": "is empty; name a file or folder",
            "none": "none: cannot be read: No such file or directory; name a recipe file",
            "folder": "folder: cannot be read: it is a folder; name a recipe file",
            "pipe": "pipe: cannot be read: it is a pipe into which nothing writes; name a recipe file",
            "socket": "socket: cannot be read: it is a socket; name a recipe file",
            "/dev/zero": "/dev/zero: cannot be read: it is a device; name a recipe file",
        }.items():
            refused(message, command, name)


def test_a_recipe_from_a_pipe_that_somebody_writes_slowly() -> None:
    def write() -> None:
        time.sleep(0.1)
        with open("pipe", "w") as pipe:
            time.sleep(1.0)
            pipe.write(RECIPE[:20])
            pipe.flush()
            time.sleep(0.2)
            pipe.write(RECIPE[20:])

    writer = threading.Thread(target=write)
    writer.start()
    result = CliRunner().invoke(app, ["check", "pipe"])
    writer.join()
    assert (result.exit_code, result.stdout) == (0, "pipe: no problems in 1 step\n")


@pytest.mark.full
@pytest.mark.parametrize(
    "line",
    [
        "cat r.yaml | GRADMAP check /dev/stdin",
        "check <(sleep 1; cat r.yaml)",
        pytest.param("check /dev/stdin < r.yaml", marks=pytest.mark.slow),
        pytest.param("check <(cat r.yaml)", marks=pytest.mark.slow),
    ],
)
def test_recipes_that_the_shell_hands_over(line: str) -> None:
    program = f"{sys.executable} -m gradmap_pipeline"
    line = line.replace("GRADMAP", program) if "GRADMAP" in line else f"{program} {line}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(": no problems in 1 step\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "Invalid value for 'FOLDER': is empty; name a file or folder"),
        ("none", "'none' is not an export: there is no such folder; name the folder of an export"),
        ("folder", "'folder' is not an export: the folder is empty"),
        ("r.yaml", "'r.yaml' is not an export: it is not a folder"),
        ("pipe", "'pipe' is not an export: it is not a folder"),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_verify_of_what_is_no_folder(name: str, message: str) -> None:
    Path("gradmap.json").write_text("{}")
    refused(message, "verify", name)


def test_verify_waits_for_no_pipe() -> None:
    os.mkfifo("folder/gradmap.json")
    result = CliRunner().invoke(app, ["verify", "folder"])
    assert (result.exit_code, result.stderr) == (4, "error: 'folder' is not an export: gradmap.json is not a file\n")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--plugin", "", "is empty; name a file or folder"),
        ("--plugin", "folder", "--plugin 'folder' is not a Python file"),
        ("--plugin", "pipe", "--plugin 'pipe' is not a Python file"),
        ("--out", "", "is empty; name a file or folder"),
        ("--out", "r.yaml", "'r.yaml' is not a folder; name a folder"),
        ("--out", "pipe/in", "pipe' is not a folder; name a folder"),
    ],
)
def test_paths_of_options(option: str, value: str, message: str) -> None:
    refused(message, "compare", "r.yaml", option, value)
    if option == "--plugin":
        refused(message, "schema", option, value)
        refused(message, "stages", option, value)


@pytest.mark.parametrize("value", ["", "folder", "pipe.py", "folder.py"])
def test_stages_check_of_what_is_no_file(value: str) -> None:
    os.mkfifo("pipe.py")
    Path("folder.py").mkdir()
    refused("there is no such file" if value.endswith(".py") else "no stage named", "stages", "--check", value)
