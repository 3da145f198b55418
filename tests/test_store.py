"""The store: what is there is complete, survives a move, and is shared by runs at the same time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, Field

from gradmap_pipeline import Artifact, ExportedFile, ModelGraph, OnnxFolder, TensorFile, TransformersFolder
from gradmap_pipeline.checkpoint.graph import BaseCheckpoint
from gradmap_pipeline.machine.digests import sha256_of
from gradmap_pipeline.run.store import Store

KEY = "a" * 64


class Thing(Artifact):
    value: int
    tensors: TensorFile


class Outputs(BaseModel):
    thing: Thing


class Exports(BaseModel):
    exported: TransformersFolder | OnnxFolder = Field(discriminator="format")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    return store


def save(store: Store, value: int = 1, key: str = KEY) -> Outputs:
    with store.step("make", key) as folder:
        file = TensorFile.save({"x": torch.full((3,), float(value))}, folder.path / "x.safetensors")
        finished = store.finish(folder, key, {"step": "make"}, Outputs(thing=Thing(value=value, tensors=file)))
    assert isinstance(finished, Outputs)
    return finished


def test_what_is_stored_is_found_again(store: Store) -> None:
    saved = save(store)
    loaded = store.load("make", KEY, Outputs)
    assert loaded == saved
    assert saved.thing.tensors.load()["x"].tolist() == [1.0, 1.0, 1.0]
    assert store.load("make", "b" * 64, Outputs) is None
    assert store.load("other", KEY, Outputs) is None


def test_store_can_be_moved(store: Store, tmp_path: Path) -> None:
    save(store)
    shutil.move(store.root, tmp_path / "moved")
    loaded = Store(tmp_path / "moved").load("make", KEY, Outputs)
    assert isinstance(loaded, Outputs)
    assert loaded.thing.tensors.path.is_relative_to(tmp_path / "moved")
    assert loaded.thing.tensors.load()["x"].tolist() == [1.0, 1.0, 1.0]


def test_step_that_fails_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.step("make", KEY) as folder:
            (folder.path / "half").write_text("written")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((store.root / "steps").iterdir()) == []
    assert store.load("make", KEY, Outputs) is None


def test_result_without_its_tensors_is_made_again(store: Store) -> None:
    save(store).thing.tensors.path.unlink()
    assert store.load("make", KEY, Outputs) is None


def test_result_of_a_run_at_the_same_time_stays(store: Store) -> None:
    """Whoever finishes second takes what is there, and takes nothing away."""
    with store.step("make", KEY) as folder:
        file = TensorFile.save({"x": torch.zeros(3)}, folder.path / "x.safetensors")
        first = save(Store(store.root), 1)  # shares the folder's name with the step that is still running
        inode = first.thing.tensors.path.stat().st_ino
        folder.path.mkdir(exist_ok=True)
        second = store.finish(folder, KEY, {}, Outputs(thing=Thing(value=1, tensors=file)))
    assert second == first
    assert first.thing.tensors.path.stat().st_ino == inode


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "other", "outputs": {}}', '{"outputs": {"thing": 1}}'])
def test_damaged_results_are_made_again(store: Store, content: str) -> None:
    save(store)
    (file,) = (store.root / "steps").glob("*/outputs.json")
    file.write_text(content)
    assert store.load("make", KEY, Outputs) is None
    assert save(store, 2).thing.value == 2


def test_keys_that_share_a_folder_name_are_told_apart(store: Store) -> None:
    save(store, 1, KEY)
    twin = KEY[:16] + "b" * 48
    assert store.load("make", twin, Outputs) is None
    save(store, 2, twin)
    assert store.load("make", KEY, Outputs) is None


def test_export_that_is_gone_is_not_served(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "file").write_text("12345")
    files = {"file": ExportedFile(size=5, sha256=sha256_of(folder / "file"))}
    with store.step("export", KEY) as step:
        base = BaseCheckpoint(folder=tmp_path, name="x", sha256="0", layers=2)
        graph = ModelGraph(base=base, layers=(0, 1))
        exported = OnnxFolder(graph=graph, folder=folder, files=files, max_logit_difference=0.0)
        store.finish(step, KEY, {}, Exports(exported=exported))
    assert store.load("export", KEY, Exports) == Exports(exported=exported)
    (folder / "file").write_text("1234")
    assert store.load("export", KEY, Exports) is None
    (folder / "file").unlink()
    assert store.load("export", KEY, Exports) is None


def test_step_that_is_being_made_survives_the_start_of_another_run(store: Store) -> None:
    with store.step("make", KEY) as folder:
        Store(store.root).prepare()
        assert folder.path.is_dir()
    assert list((store.root / "steps").iterdir()) == []
    assert (store.root / ".gitignore").read_text() == "*\n"


def test_units_are_kept_one_by_one(store: Store) -> None:
    assert store.load_unit("score", "key") is None
    store.save_unit("score", "key", {"loss": 1.5}, 2.0)
    assert Store(store.root).load_unit("score", "key") == {"value": {"loss": 1.5}, "seconds": 2.0}
    assert store.load_unit("other", "key") is None
    store.close()
    assert not list(store.root.rglob("*.partial-*"))


def test_digest_is_read_again_only_when_the_file_changes(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setattr("gradmap_pipeline.run.store.sha256_of", counted)
    monkeypatch.setattr("gradmap_pipeline.run.store._UNSETTLED_NS", 0)
    file = tmp_path / "file"
    file.write_text("one")
    first = store.digest_of(file)
    assert first == sha256_of(file)
    assert Store(store.root).digest_of(file) == first
    assert len(read) == 1
    file.write_text("two")
    assert store.digest_of(file) == sha256_of(file) != first
    assert len(read) == 2


def test_digest_of_a_file_that_has_just_changed_is_not_remembered(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    assert store.digest_of(tmp_path / "file") == sha256_of(tmp_path / "file")
    assert not (store.root / "files.json").exists()


@pytest.mark.parametrize("content", ["", "[", "[]", '{"x": 1}'])
def test_damaged_list_of_digests_is_made_again(store: Store, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmap_pipeline.run.store._UNSETTLED_NS", 0)
    file = tmp_path / "file"
    file.write_text("one")
    (store.root / "files.json").write_text(content)
    assert store.digest_of(file) == sha256_of(file)
    assert str(file.resolve()) in json.loads((store.root / "files.json").read_text())


def test_damaged_unit_is_made_again(store: Store) -> None:
    store.save_unit("score", "key", 1, 0.5)
    (unit,) = (store.root / "units").iterdir()
    unit.write_text("{")
    assert store.load_unit("score", "key") is None
