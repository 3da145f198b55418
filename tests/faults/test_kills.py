"""kill -9 at any moment: what is finished is kept, the next run goes on to the same bytes, and nothing is left over."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.digests import sha256_of, sha256_of_value
from gradmap_pipeline.stages.targets import find_foreign_files

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
KILLS = 60
TIMED = {"seconds", "peak_bytes", "saved", "sha256", "rounds", "gradmap.json"}
CHANGES_FILES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
PRUNE_AND_EXPORT = """\
version: 1
model: {path: MODEL}
steps:
  - use: prune
    with: {layers: [LAYER]}
  - use: export
    with: {to: out}
"""


def without_times(value: Any) -> Any:
    """Seconds and peaks of memory, and digests over them, differ from run to run; the lineage of an export holds them too."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMED}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def content_of(folder: Path) -> dict[str, str]:
    """Digest of every file under the store's steps and the export."""
    files = [file for part in (folder / ".gradmap" / "steps", folder / "out") for file in sorted(part.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(folder)): sha256_of_value(without_times(json.loads(file.read_text())))
        if file.name in ("outputs.json", "gradmap.json")
        else sha256_of(file)
        for file in files
    }


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".partial-" in path.name]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The quickstart, from an empty store again and again, until it has been killed 60 times."""
    recipe = ROOT / "recipes" / "quickstart.yaml"
    command = [sys.executable, "-m", "gradmap_pipeline", "run", str(recipe), "--quiet", "--threads", "1"]
    folder = tmp_path / "work"
    folder.mkdir()
    started = time.monotonic()
    subprocess.run(command, cwd=folder, check=True)
    whole_seconds = time.monotonic() - started
    wanted = content_of(folder)
    moments = random.Random(0)
    kills = rounds = 0
    while kills < KILLS:
        rounds += 1
        shutil.rmtree(folder)
        folder.mkdir()
        finished: dict[Path, int] = {}
        while True:
            process = subprocess.Popen(command, cwd=folder)
            try:
                code = process.wait(moments.uniform(0.2, 0.7) * whole_seconds if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            else:
                assert code == 0
            for file, number in finished.items():
                assert file.stat().st_ino == number, f"{file} was finished, and was made again after kill {kills}"
            finished = dict(finished_files(folder))
            if process.returncode == 0:
                break
        assert content_of(folder) == wanted, f"after kill {kills}"
        assert not leftovers(folder)
    print(f"{kills} kills in {rounds} rounds of the quickstart")


def finished_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Give the files of finished steps and units, which a run must not make again, with the numbers that the system gave them.

    Files on a model's structure are left out: they grow with what is asked.
    """
    for pattern in ("steps/*/outputs.json", "units/*.json"):
        for file in (folder / ".gradmap").glob(pattern):
            if not file.name.startswith("structure-"):
                yield file, file.stat().st_ino


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True], ids=["first", "replacement"])
def test_killed_before_each_file_operation(replaces: bool, tmp_path: Path, llama: Path) -> None:
    """Prune and export, killed before the first change of a file, then before the second, until nothing is left to kill."""
    recipe = PRUNE_AND_EXPORT.replace("MODEL", str(llama))
    template, folder = tmp_path / "template", tmp_path / "work"
    template.mkdir()
    (template / "r.yaml").write_text(recipe.replace("LAYER", "1"))
    (template / "other.yaml").write_text(recipe.replace("LAYER", "2"))
    if replaces:
        assert run_here(template, "other.yaml") == 0
    shutil.copytree(template, folder)
    assert run_here(folder, "r.yaml") == 0
    wanted = content_of(folder)
    shutil.rmtree(folder)
    operation, is_killed = 0, True
    while is_killed:
        operation += 1
        shutil.copytree(template, folder)
        is_killed = run_here(folder, "r.yaml", kill_before=operation) == -signal.SIGKILL
        if (folder / "out").exists():
            assert list(find_foreign_files(folder / "out")) == [], f"the export is half-written at operation {operation}"
        assert (folder / "out").exists() or not replaces, f"there is no export at operation {operation}"
        assert run_here(folder, "r.yaml") == 0
        assert content_of(folder) == wanted, f"other bytes after a kill before operation {operation}"
        assert not leftovers(folder), f"left over after a kill before operation {operation}"
        shutil.rmtree(folder)
    assert operation > 40
    print(f"killed before each of {operation - 1} file operations")


def run_here(folder: Path, recipe: str, kill_before: int | None = None) -> int:
    """Run a recipe in a fork of this process, which has its libraries loaded; return how it ended, as `subprocess` says it."""
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        if kill_before is not None:
            kill_self_before(kill_before, folder)
        result = CliRunner().invoke(app, ["run", recipe, "--quiet"])
        if result.exit_code:
            print(result.output, result.exception, file=sys.stderr, flush=True)
        os._exit(result.exit_code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def kill_self_before(number: int, folder: Path) -> None:
    """End this process before its `number`th operation that changes something under a folder."""
    left = number

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(path, str | bytes | os.PathLike) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        elif event == "ctypes.dlsym":
            path, changes = folder, arguments[1] == "renameat2"
        else:
            path, changes = (arguments[0] if arguments else None), event in CHANGES_FILES
        if changes and str(folder) in os.fsdecode(os.path.abspath(path)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)
