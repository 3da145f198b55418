"""What lies in the store is compared with its digest before it is used. What does not fit is made again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.digests import sha256_of
from gradmap_pipeline.run.store import Store

pytestmark = pytest.mark.full

RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: calibrate
    with: {dataset: {path: TEXT}, samples: 4, sequence_length: 16}
  - use: gradmap_score
    with: {layers: 1}
  - use: prune
    with: {layers: 1}
  - use: project_compensate
  - use: evaluate
    with: {dataset: {path: TEXT}, samples: 4, sequence_length: 16}
  - use: export
    with: {to: out}
"""


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def computed(result: Result) -> set[str]:
    """Steps that were not taken from the store."""
    assert result.exit_code == 0, result.stdout
    events = [json.loads(line) for line in result.stdout.splitlines()]
    return {event["step"] for event in events if event["event"] == "step_finished" and not event["cached"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """A folder in which the recipe has run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.yaml").write_text(RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert gradmap("run", "r.yaml", "--quiet").exit_code == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    gradmap("run", "r.yaml", "--quiet")  # the export of this folder
    return tmp_path


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def keep_size_and_time(file: Path) -> None:
    status = file.stat()
    flip_bit(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGES: dict[str, Callable[[Path], None]] = {"bit": flip_bit, "cut": cut, "same size and time": keep_size_and_time}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("step", ["calibrate", "project_compensate"])
def test_tensors_that_changed_in_the_store_are_made_again(step: str, damage: str, folder: Path) -> None:
    weights = sha256_of(folder / "out" / "model.safetensors")
    file = sorted((folder / ".gradmap" / "steps").glob(f"{step}-*/*.safetensors"))[-1]
    DAMAGES[damage](file)
    assert computed(gradmap("run", "r.yaml", "--json")) == {step}
    assert sha256_of(folder / "out" / "model.safetensors") == weights
    assert computed(gradmap("run", "r.yaml", "--json")) == set()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"removed": 2', '"removed": 1').replace('"removed":2', '"removed":1'),
        lambda text: text.replace('"protected"', '"protect"'),
        lambda text: json.dumps(json.loads(text) | {"outputs": []}),
        lambda text: json.dumps(json.loads(text) | {"seconds": "ten"}),
        lambda _: "[" * 100_000,
        lambda _: '"text"',
        lambda _: "\x00\xff",
    ],
    ids=["number", "key", "type", "seconds", "nesting", "text", "bytes"],
)
def test_results_that_changed_in_the_store_are_made_again(change: Callable[[str], str], folder: Path) -> None:
    (file,) = (folder / ".gradmap" / "steps").glob("gradmap_score-*/outputs.json")
    before = json.loads(file.read_text())["outputs"]["scores"]
    changed = change(file.read_text())
    if changed == file.read_text():
        changed = changed.replace(f'"removed": {before["decisions"][0]["removed"]}', '"removed": 99')
    assert changed != file.read_text()
    file.write_text(changed, encoding="latin-1")
    assert computed(gradmap("run", "r.yaml", "--json")) == {"gradmap_score"}
    assert json.loads(file.read_text())["outputs"]["scores"] == before


def put_file(path: Path) -> None:
    path.write_text("x")


def put_folder(path: Path) -> None:
    (path / "inner").mkdir(parents=True)


def put_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [put_file, put_folder, put_dangling_link, os.mkfifo])
@pytest.mark.parametrize("name", ["steps", "units", "steps/prune-*", "steps/prune-*/outputs.json", "files.json", ".gitignore"])
def test_things_of_another_kind_in_the_store_are_made_again(name: str, put: Callable[[Path], None], folder: Path) -> None:
    (path,) = (folder / ".gradmap").glob(name)
    is_folder = path.is_dir()
    if is_folder:
        shutil.rmtree(path)
    else:
        path.unlink()
    put(path)
    assert gradmap("run", "r.yaml", "--quiet").exit_code == 0
    (again,) = (folder / ".gradmap").glob(name)
    assert again.is_dir() if is_folder else again.is_file()
    assert not again.is_symlink()
    assert computed(gradmap("run", "r.yaml", "--json")) == set()


def test_units_that_changed_in_the_store_are_made_again(folder: Path) -> None:
    """A unit is the loss of the evaluation; its step is made again from it."""
    units = sorted((folder / ".gradmap" / "units").glob("evaluate-*.json"))
    (step,) = (folder / ".gradmap" / "steps").glob("evaluate-*")
    perplexity = json.loads((step / "outputs.json").read_text())["outputs"]["evaluation"]["perplexity"]
    for unit in units:
        content = json.loads(unit.read_text())
        content["value"]["loss"] += 1
        unit.write_text(json.dumps(content))
    shutil.rmtree(step)
    assert computed(gradmap("run", "r.yaml", "--json")) == {"evaluate"}
    assert json.loads((step / "outputs.json").read_text())["outputs"]["evaluation"]["perplexity"] == perplexity


def test_export_that_was_edited_since_is_made_again_when_its_files_are_known_as_ours(folder: Path) -> None:
    """Same name, same size: the digest tells. The edited file is somebody's work, so the run stops instead of deleting it."""
    flip_bit(folder / "out" / "config.json")
    result = gradmap("run", "r.yaml")
    assert result.exit_code == 2, result.stdout
    assert "holds 'config.json', which has been changed since it was exported" in result.stderr
    assert gradmap("run", "r.yaml", "--set", "export.overwrite=true").exit_code == 0
    assert gradmap("verify", "out").exit_code == 0


def test_digest_of_a_model_that_was_edited_in_place_is_new(tmp_path: Path, llama: Path) -> None:
    """Size and time of modification are kept; the time of the change is the system's own."""
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    store = Store(tmp_path / "store")
    store.prepare()
    first = store.digest_of(file)
    keep_size_and_time(file)
    assert Store(tmp_path / "store").digest_of(file) == sha256_of(file) != first
