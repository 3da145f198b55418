"""A folder with its name is complete, and the one it replaces is not lost on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradmap_pipeline.machine import atomic_folder as module
from gradmap_pipeline.machine.atomic_folder import (
    atomic_folder,
    clear_unfinished_folders,
    replace_folder,
    scratch_folder,
    write_file,
)

HOLD = """
import sys, time
from pathlib import Path
from gradmap_pipeline.machine.atomic_folder import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
    print(folder.name, flush=True)
    time.sleep(600)
"""

KILLED_AFTER_RENAMES = """
import os, signal, sys
from pathlib import Path
from gradmap_pipeline.machine import atomic_folder as module
target, left = Path(sys.argv[1]), int(sys.argv[2])
rename = Path.rename
def rename_and_die(path, to):
    global left
    rename(path, to)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
module.ctypes.CDLL = lambda *_, **__: object()
with module.atomic_folder(target) as folder:
    (folder / "file").write_text("new")
    Path.rename = rename_and_die
    module._exchange(folder, target)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_is_there_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as draft:
        (draft / "file").write_text("new")
        assert not target.exists()
        replace_folder(draft, target)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_folder_takes_the_place_of_another(can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: object())
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_folder(target) as draft:
        (draft / "new").write_text("new")
        replace_folder(draft, target)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["new"]


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", target)
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["out", "out[1]", "*", "x" * 250])
def test_folder_of_a_running_process_stays_and_that_of_a_killed_one_goes(name: str, tmp_path: Path) -> None:
    """Whatever its process id is to us: the lock tells whether it runs."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / name)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = process.stdout.readline().strip()
        clear_unfinished_folders(tmp_path)
        assert (tmp_path / held / "file").read_text() == "half"
        process.send_signal(signal.SIGKILL)
        process.wait()
        clear_unfinished_folders(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("renames", [1, 2])
def test_what_a_process_killed_between_two_renames_leaves(renames: int, tmp_path: Path) -> None:
    """Where folders cannot be exchanged in one step, the old one is put back unless the new one stands."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_RENAMES, str(target), str(renames)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) > 1
    clear_unfinished_folders(tmp_path)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["file"]
    assert (target / "file").read_text() == ("new" if renames == 2 else "old")


def test_two_processes_replace_a_folder_and_a_reader_finds_one_at_any_time(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write = """
import sys
from pathlib import Path
from gradmap_pipeline.machine.atomic_folder import atomic_folder, replace_folder
for number in range(100):
    with atomic_folder(Path(sys.argv[1])) as folder:
        (folder / "file").write_text("whole")
        replace_folder(folder, Path(sys.argv[1]))
"""
    writers = [subprocess.Popen([sys.executable, "-c", write, str(target)]) for _ in range(2)]
    while not target.exists():
        assert any(writer.poll() is None for writer in writers)
    looks = 0
    while any(writer.poll() is None for writer in writers):
        assert (target / "file").read_text() == "whole"
        looks += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert looks > 10
    assert names(tmp_path) == ["out"]


def test_temporary_folder_of_a_killed_process_is_cleared_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "gradmap")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = process.stdout.readline().strip()
        process.kill()
    assert left in names(tmp_path)
    with scratch_folder() as folder:
        assert [name for name in names(tmp_path) if not name.endswith(".lock")] == [folder.name]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert names(tmp_path) == []


def test_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "file", "old", tmp_path)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", "new", tmp_path)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_gets_its_name_is_on_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut right after the rename finds no empty file under a final name."""
    events: list[str] = []
    fsync, rename = module.os.fsync, module.Path.rename

    def record_sync(number: int) -> None:
        events.append(Path(f"/proc/self/fd/{number}").resolve().name)
        fsync(number)

    def record_rename(path: Path, to: Path) -> Path:
        events.append(f"rename to {to.name}")
        return rename(path, to)

    monkeypatch.setattr(module.os, "fsync", record_sync)
    monkeypatch.setattr(module.Path, "rename", record_rename)
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "inside").mkdir()
        (draft / "inside" / "file").write_text("x")
        replace_folder(draft, tmp_path / "out")
    at = events.index("rename to out")
    assert {"file", "inside", draft.name} <= set(events[:at])
    assert events[at + 1] == tmp_path.name


def test_run_in_another_process_namespace_deletes_nothing(tmp_path: Path) -> None:
    """Process ids mean nothing there: a container that shares the folder sees other ones."""
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*elsewhere, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make process namespaces")
    clear = "import sys; from pathlib import Path; from gradmap_pipeline.machine import atomic_folder as made; "
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("half")
        subprocess.run(
            [*elsewhere, sys.executable, "-c", clear + "made.clear_unfinished_folders(Path(sys.argv[1]))", str(tmp_path)],
            check=True,
        )
        assert (draft / "file").read_text() == "half"
