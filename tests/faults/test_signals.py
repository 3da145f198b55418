"""Signals at any moment end a run with 130, one message and nothing left; other processes of a run end with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from torchrun import run_python

from gradmap_pipeline.errors import CapacityError, GradmapError, Interruption, StageError
from gradmap_pipeline.machine.processes import explain_end, tie
from gradmap_pipeline.report.run_log import list_heads

pytestmark = [pytest.mark.full, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

PLUGIN = '''
import os, signal, subprocess, sys, time
from pathlib import Path
from pydantic import BaseModel, Field
from gradmap_pipeline import Artifact, ModelGraph, Stage, hookimpl

class Told(Artifact):
    pass

class Wait(Stage):
    """Wait."""
    name = "wait"
    how: str = Field("sleep", description="In which way.")
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        told: Told
    def run(self, inputs, context):
        (context.folder / "begun").write_text("x")
        Path("waits").write_text(str(os.getpid()))
        if self.how == "swallowed":
            class Deaf:
                def __del__(self):
                    time.sleep(0.5)
            for _ in range(5):
                Deaf()
        if self.how == "turned":
            try:
                time.sleep(60)
            except BaseException:
                raise ValueError("something went wrong")
        if self.how == "slow end":
            try:
                time.sleep(60)
            finally:
                Path("ending").write_text("x")
                time.sleep(60)
        if self.how.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.how))
        time.sleep(60)
        return self.Outputs(told=Told())

@hookimpl
def gradmap_stages():
    return [Wait]
'''


@pytest.fixture
def folder(tmp_path: Path, llama: Path) -> Path:
    (tmp_path / "p.py").write_text(PLUGIN)
    step = {"use": "wait"}
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [step]}))
    elsewhere = {**step, "run": {"python": sys.executable}}
    (tmp_path / "w.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [elsewhere]}))
    (tmp_path / "temporary").mkdir()
    return tmp_path


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own; ended with the block, should a test fail."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gradmap_pipeline", "run", *arguments, "--plugin", "p.py"],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder / "temporary")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < last
        time.sleep(0.02)


def wait_until_watching(process: subprocess.Popen[str]) -> None:
    """Until it has a handler for SIGTERM; before that, Python itself is starting."""
    bit = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & bit:
            return
        time.sleep(0.001)


def check_interrupted(process: subprocess.Popen[str], folder: Path, said: str = "interrupted; what is finished is kept") -> None:
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    assert err == "" if said == "" else f"error: {said}" in err, err
    assert err.count("\n") == 1, err
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGTERM, "sleep"), (signal.SIGHUP, "turned"), (signal.SIGINT, "swallowed")],
)
def test_one_signal_while_a_stage_runs(number: int, how: str, folder: Path) -> None:
    """Also where it comes inside a destructor, which cannot raise it, and where the stage makes another error of it."""
    with started(folder, "r.yaml", "--set", f"wait.how={how}") as process:
        wait_for(folder / "waits", process)
        time.sleep(0.1)
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)  # as `timeout` does: it counts as the same
        check_interrupted(process, folder)
    (head,), _ = list_heads(folder / ".gradmap", 0)
    assert (head["outcome"], head["exit_code"]) == ("interrupted", 130)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_modules_are_imported(number: int, folder: Path) -> None:
    for delay in (0, 0.05, 0.2):
        with started(folder, "r.yaml") as process:
            wait_until_watching(process)
            time.sleep(delay)
            process.send_signal(number)
            check_interrupted(process, folder)


def test_second_interruption_ends_at_once(folder: Path) -> None:
    with started(folder, "r.yaml", "--set", "wait.how=slow end") as process:
        wait_for(folder / "waits", process)
        process.send_signal(signal.SIGINT)
        wait_for(folder / "ending", process)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=5)
        assert (process.returncode, err) == (130, "error: interrupted again; ended at once\n")


def test_ignored_signals_stay_ignored(folder: Path) -> None:
    """As under nohup."""
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from gradmap_pipeline.cli.ending import watch_signals;"
        "watch_signals(); print(int(signal.getsignal(signal.SIGHUP)), signal.getsignal(signal.SIGTERM))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{signal.SIG_IGN:d} <function _interrupt")


def is_gone(pid: int, seconds: float = 2) -> bool:
    last = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > last:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_worker_ends_with_the_run(number: int, folder: Path) -> None:
    with started(folder, "w.yaml") as process:
        wait_for(folder / "waits", process)
        worker = int((folder / "waits").read_text())
        assert psutil.pid_exists(worker)
        process.send_signal(number)
        if number == signal.SIGTERM:
            check_interrupted(process, folder)
        else:
            process.communicate(timeout=10)
        assert is_gone(worker)


def test_scratch_folders_of_a_killed_run_are_cleared_by_the_next(folder: Path) -> None:
    with started(folder, "w.yaml") as process:
        wait_for(folder / "waits", process)
        process.kill()
        process.communicate()
    assert len(list((folder / "temporary").glob(".gradmap.partial-????????"))) == 1
    (folder / "waits").unlink()
    with started(folder, "w.yaml") as process:
        wait_for(folder / "waits", process)
        assert len(list((folder / "temporary").glob(".gradmap.partial-????????"))) == 1
        process.send_signal(signal.SIGTERM)
        check_interrupted(process, folder)
    assert not list((folder / "temporary").iterdir())


@pytest.mark.parametrize("is_tied", [False, True])
def test_tracer_ends_with_its_parent(is_tied: bool, tmp_path: Path) -> None:
    """By the kernel, and by the end of its standard input where there is no such kernel."""
    pid = tmp_path / "pid"
    note = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid()))"
    wait = "time.sleep(60)" if is_tied else "from gradmap_pipeline.export.ort.apart import _end_with_parent; _end_with_parent()"
    command = [sys.executable, "-c", f"{note}; {wait}"]
    untie = "" if is_tied else "apart.tie = list; "
    run = f"apart._run({command!r}, Path({str(tmp_path / 'log')!r}))"
    parent = f"from pathlib import Path; from gradmap_pipeline.export.ort import apart; {untie}{run}"
    process = subprocess.Popen([sys.executable, "-c", parent], text=True)
    try:
        wait_for(pid, process)
        while not (text := pid.read_text()):
            time.sleep(0.01)
        child = int(text)
        assert not is_gone(child, 0.3)
    finally:
        process.kill()
        process.wait()
    assert is_gone(child)


def test_a_tied_program_runs_as_itself(tmp_path: Path) -> None:
    code = "import sys, os; print(sys.argv[1:], os.getppid()); sys.exit(7)"
    done = subprocess.run(tie([sys.executable, "-c", code, "a b", ""]), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, f"['a b', ''] {os.getpid()}\n")


@pytest.mark.parametrize(
    ("code", "said", "cls", "message"),
    [
        (-9, "", CapacityError, "it was killed by signal 9, as the system does when memory runs out"),
        (-11, "last words\n", StageError, "it crashed (SIGSEGV): last words"),
        (-6, "", StageError, "it crashed (SIGABRT)"),
        (-7, "", StageError, "it crashed (SIGBUS)"),
        (-4, "", StageError, "it crashed (SIGILL)"),
        (-6, "terminate called\n  what():  std::bad_alloc\n", CapacityError, "it ran out of memory: what():  std::bad_alloc"),
        (-25, "", CapacityError, "it wrote a file larger than the limit on the size of files"),
        (-15, "Traceback", Interruption, "it was interrupted (SIGTERM)"),
        (-2, "", Interruption, "it was interrupted (SIGINT)"),
        (1, "OSError: [Errno 28] No space left on device\nbye\n", CapacityError, "it ran out of disk"),
        (3, "a\nb\n\n", StageError, "it ended with code 3: b"),
        (3, "", StageError, "it ended with code 3"),
    ],
)
def test_how_another_process_ended(code: int, said: str, cls: type[GradmapError], message: str) -> None:
    error = explain_end("it", code, said, "; see log")
    assert type(error) is cls
    assert str(error).startswith(message)
    assert error.exit_code == {CapacityError: 3, StageError: 4, Interruption: 130}[cls]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [("SIGSEGV", 4, "crashed (SIGSEGV)"), ("SIGKILL", 3, "was killed by signal 9"), ("SIGTERM", 130, "was interrupted (SIGTERM)")],
)
def test_worker_that_a_signal_ends(name: str, code: int, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from gradmap_pipeline.cli import app

    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["run", "w.yaml", "--plugin", "p.py", "--set", f"wait.how={name}"])
    assert result.exit_code == code
    assert result.stderr.startswith(f"error: step 'wait': the process of the stage {message}")


def test_torchrun_tells_once(folder: Path, text: Path) -> None:
    """What every process meets is told by the first; torchrun's own exit code is 1."""
    (folder / "p.py").write_text(
        PLUGIN.replace('name = "wait"', 'name = "wait"\n    parallel = True').replace("time.sleep(60)", "1 / 0")
    )
    done = run_python(folder, 2, "-m", "gradmap_pipeline", "run", "r.yaml", "--plugin", "p.py")
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(ours) == 1, done.stderr
    assert "stage 'wait' (p.py) failed: ZeroDivisionError: division by zero; traceback in" in ours[0]
    assert "exitcode  : 4" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_many_moments(number: int, tmp_path: Path, llama: Path, text: Path) -> None:
    """Of a whole run: imports, each step, the workers' start, the end."""
    data = {"dataset": {"path": str(text)}, "samples": 64, "sequence_length": 64}
    steps = [
        {"use": "evaluate", "id": "dense", "with": data},
        {"use": "calibrate", "with": data},
        {"use": "gradmap_score", "with": {"layers": 2}},
        {"use": "prune", "with": {"layers": 2}},
        {"use": "project_compensate"},
        {"use": "export", "with": {"to": "out"}},
    ]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    (tmp_path / "p.py").write_text(PLUGIN)
    (tmp_path / "temporary").mkdir()
    for step in range(24):
        delay = 0.04 * step + 0.012 * step**2
        with started(tmp_path, "r.yaml", "--store", f"store-{step}", "--set", f"export.to=out-{step}") as process:
            wait_until_watching(process)
            time.sleep(delay)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert process.returncode in (0, 130), (delay, out, err)
            assert "Traceback" not in err, (delay, err)
            assert err.count("error:") == (process.returncode != 0), (delay, err)
            assert not [path for path in tmp_path.rglob("*") if "partial" in path.name], delay
