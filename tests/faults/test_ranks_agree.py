"""Several processes come to the same decisions, or end together with one message: none goes its own way."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from torchrun import run_python

pytestmark = pytest.mark.full

PLUGIN = '''
import os, signal
from gradmap_pipeline import CapacityError, StageError, hookimpl
from gradmap_plugins.project_compensate import ProjectCompensate
from gradmap_pipeline.correction.sites import NoSiteError

SECOND = os.environ.get("RANK") == "1"

class Odd(ProjectCompensate):
    """Correct, but for one process."""
    name = "odd_compensate"
    parallel = True
    def correct(self, streams, layer, known, context):
        if SECOND and layer == 2:
            ACT
        return super().correct(streams, layer, known, context)

@hookimpl
def gradmap_stages():
    return [Odd]
'''
RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: calibrate
    with: {dataset: {path: TEXT}, samples: 6, sequence_length: 16}
  - use: prune
    with: {layers: [1]}
  - use: odd_compensate
"""


def run(folder: Path, act: str, llama: Path, text: Path) -> tuple[int, str, list[dict[str, object]], float]:
    """Exit code, standard error, events, seconds of a run in two processes of which the second does something else."""
    (folder / "odd.py").write_text(PLUGIN.replace("ACT", act))
    (folder / "r.yaml").write_text(RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)))
    started = time.monotonic()
    done = run_python(folder, 2, "-m", "gradmap_pipeline", "run", "r.yaml", "--plugin", "odd.py", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, done.stderr, events, time.monotonic() - started


LOST = (
    "process 1 of 2 has ended without a message, as when it is killed or its machine fails. What is finished is kept; run the same "
    "command to go on"
)
REFUSE = """pass
        return super().correct(streams, layer, known, context)

from gradmap_pipeline.correction import streams as module
check_gain = module.check_gain
def refuse(model, index, hidden, arguments, site):
    if SECOND and index == 2 and site.role == "output":
        raise NoSiteError("this map has no place here")
    check_gain(model, index, hidden, arguments, site)
module.check_gain = refuse

class Unused(Odd):
    \"\"\"Never used.\"\"\"
    name = "unused_compensate"
    def correct(self, streams, layer, known, context):
        if True:
            pass"""


def test_site_that_one_process_refuses_is_left_by_all(tmp_path: Path, llama: Path, text: Path) -> None:
    code, stderr, events, _ = run(tmp_path, REFUSE, llama, text)
    assert code == 0, stderr
    (finished,) = [event for event in events if event["event"] == "step_finished" and event["step"] == "odd_compensate"]
    outputs: dict[str, dict[str, list[dict[str, object]]]] = finished["outputs"]  # type: ignore[assignment]
    corrected = {(site["layer"], site["role"]) for site in outputs["compensation"]["sites"]}
    assert corrected == {(0, "output"), (2, "attention"), (3, "attention"), (3, "output")}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("raise StageError('only here')", "only here"),
        ("raise CapacityError('no room here')", "no room here"),
        ("raise ZeroDivisionError('only here')", "ZeroDivisionError: only here"),
    ],
)
def test_error_of_one_process_ends_all_with_its_message(act: str, message: str, tmp_path: Path, llama: Path, text: Path) -> None:
    code, stderr, events, seconds = run(tmp_path, act, llama, text)
    assert code != 0
    errors = [str(event["message"]) for event in events if event["event"] == "error"]
    told = [*errors, *(line for line in stderr.splitlines() if line.startswith("error: "))]
    assert any(message in line for line in told), (told, stderr[-2000:])
    assert seconds < 60


def test_processes_that_have_gone_different_ways_say_so(tmp_path: Path) -> None:
    script = tmp_path / "apart.py"
    script.write_text("""
import torch
from gradmap_pipeline.errors import StageError
from gradmap_pipeline.machine.distributed import open_group
try:
    with open_group("cpu") as group:
        group.sum(torch.ones(2 + group.rank))
except StageError as error:
    print("told:", error, flush=True)
""")
    done = run_python(tmp_path, 2, str(script))
    assert done.stdout.count("told: the processes of this run have gone different ways") == 2, done.stderr[-2000:]


def test_process_that_dies_ends_the_others(tmp_path: Path, llama: Path, text: Path) -> None:
    code, _, events, seconds = run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", llama, text)
    assert code != 0
    errors = [str(event["message"]) for event in events if event["event"] == "error"]
    assert errors == [LOST]
    assert seconds < 60
