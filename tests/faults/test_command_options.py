"""Odd values of options: one line, exit code 2; 3 for a device that is not there, 4 for odd variables of a launcher."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.memory import parse_size


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    steps = f"steps:\n  - use: evaluate\n    with: {{dataset: {{path: {text}}}, samples: 2, sequence_length: 16}}\n"
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\n{steps}")
    return tmp_path


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["run", "r.yaml", *arguments])


def refused(result: Result, message: str, code: int = 2) -> None:
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.stderr
    assert message in result.stderr


@pytest.mark.parametrize("value", ["0", "-1", "100000", "99999999999999999999"])
def test_threads(folder: Path, value: str) -> None:
    most = 4 * (os.cpu_count() or 1)
    refused(gradmap("--threads", value), f"found {value}, accepted: 1 to {most}, 4 for each core of this machine")


@pytest.mark.parametrize(
    "value", ["1e3", "-1", "nan", "inf", "", "GiB", "9999999TiB", "9" * 400, "1" + "0" * 29 + "TiB", "٣GiB", "3 GiB 4"]
)
def test_memory(folder: Path, value: str) -> None:
    refused(gradmap(f"--memory={value}"), "accepted: a size such as 3GiB, 512MiB or 2.5GB")


def test_memory_that_is_next_to_nothing(folder: Path) -> None:
    refused(gradmap("--memory", "0.0001GiB"), "or more with --memory", 3)
    assert parse_size("0.0001GiB") == 107374
    assert parse_size("1048576TiB") == 2**60


@pytest.mark.parametrize("value", ["", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CPU", "cuda:٣", "cuda:1\n"])
def test_device(folder: Path, value: str) -> None:
    refused(gradmap(f"--device={value}"), "accepted: auto, cpu, cuda, cuda:1")


@pytest.mark.parametrize("value", ["cuda:99999999999", "cuda:007"])
def test_device_that_is_not_there(folder: Path, value: str) -> None:
    refused(gradmap("--device", value), f"--device {value}: torch sees", 3)


def test_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(gradmap("--store", ""), "is empty; name a folder")
    refused(gradmap("--store", "r.yaml"), "'r.yaml' is a file; name a folder")
    refused(gradmap("--store", "r.yaml/below/it"), "r.yaml' is a file; name a folder")
    refused(gradmap("--store", "/"), "'/' holds other things; name a new folder, or one that is a store")
    refused(gradmap("--store", "."), "'.' holds other things")
    refused(gradmap("--store", "x" * 300), "cannot be a folder: File name too long")
    refused(gradmap("--store", "/proc/self/store"), "cannot be ")
    (folder / "link").symlink_to("nowhere/at/all")
    refused(gradmap("--store", "link"), "")
    assert not (folder / ".gitignore").exists()
    for new in ("new/store", "empty"):
        (folder / "empty").mkdir(exist_ok=True)
        assert gradmap("--store", new, "--quiet").exit_code == 0
        assert gradmap("--store", new, "--quiet").exit_code == 0


def test_plugin(folder: Path) -> None:
    (folder / "binary.py").write_bytes(bytes(range(256)) * 4)
    (folder / "latin.py").write_bytes("x = 'é'".encode("latin-1"))
    (folder / "empty.py").write_text("")
    (folder / "folder.py").mkdir()
    for name, message in {
        "": "is empty; name a file or folder",
        "folder.py": "--plugin 'folder.py' is not a Python file",
        "nowhere.py": "--plugin 'nowhere.py' is not a Python file",
        "r.yaml": "--plugin 'r.yaml' is not a Python file",
        "binary.py": "plugin 'binary.py' cannot be imported: ",
        "latin.py": "plugin 'latin.py' cannot be imported: SyntaxError: ",
        "empty.py": "plugin 'empty.py' has no function gradmap_stages()",
    }.items():
        refused(gradmap("--plugin", name), message)


def test_odd_variables_end_a_run_with_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    refused(gradmap(), "the environment variable WORLD_SIZE is 'x'", 4)
