"""A folder with its name is complete, and the one it replaces is not lost on the way."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gradmap_pipeline.partial import clear_partial_folders, partial_folder, replace_folder


def test_folder_is_there_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with partial_folder(target) as partial:
        (partial / "file").write_text("new")
        assert not target.exists()
        replace_folder(partial, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", target)
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("replaced", [False, True])
def test_what_a_killed_process_left_in_between(replaced: bool, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = tmp_path / f".out.old-{platform.node()}-{dead.pid}"
    old.mkdir()
    (old / "file").write_text("old")
    if replaced:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("new")
    clear_partial_folders(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == ("new" if replaced else "old")
