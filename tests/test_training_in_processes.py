"""Two processes train as one does: the same steps up to rounding, one result for both, and no hang where one cannot go on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import Ended, run_ranks, torchrun_variables

pytestmark = pytest.mark.full

# Each step of refit_layers takes all samples that are not held out, so that in two processes its order is the same.
RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: calibrate
    with: {dataset: {path: TEXT}, samples: 16, sequence_length: 32}
  - use: prune
    with: {layers: [1]}
  - use: refit_layers
    with: {steps: 6, batch_size: REFIT}
  - use: export
    id: export_refit
    with: {to: refit}
  - use: distill
    from: {model: prune}
    with:
      dataset: {path: TEXT}
      samples: 65
      sequence_length: 16
      steps: 7
      batch_size: BATCH
      learning_rate: 0.003
      teacher_share: 0.5
      MORE
  - use: export
    with: {to: out}
"""


def write_recipe(folder: Path, model: Path, text: Path, more: str = "weights: lora", batch: int = 8, refit: int = 14) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = RECIPE.replace("MODEL", str(model)).replace("TEXT", str(text)).replace("MORE", more)
    (folder / "r.yaml").write_text(recipe.replace("BATCH", str(batch)).replace("REFIT", str(refit)))
    return folder


def run(folder: Path, processes: int = 2, *options: str) -> list[Ended]:
    return run_ranks(folder, ["run", "r.yaml", "--json", *options], [{}] if processes == 1 else torchrun_variables(processes))


def outputs(end: Ended) -> dict[str, Any]:
    return {event["step"]: event["outputs"] for event in end.events if event["event"] == "step_finished"}


@pytest.mark.parametrize(
    "more", ["weights: lora\n      samples_at_once: 2", pytest.param("weights: all", marks=pytest.mark.slow)], ids=["lora", "all"]
)
def test_two_processes_train_as_one(more: str, llama: Path, text: Path, tmp_path: Path) -> None:
    told = []
    for processes in (1, 2):
        ends = run(write_recipe(tmp_path / str(processes), llama, text, more), processes)
        assert [end.code for end in ends] == [0] * processes, ends
        told.append(outputs(ends[0]))
    for mine, other in zip(*(run["refit_layers"]["refit"]["layers"] for run in told), strict=True):
        assert mine["before"] == pytest.approx(other["before"], rel=1e-5)
        assert mine["after"] == pytest.approx(other["after"], rel=1e-2)
        assert mine["after"] < mine["before"]
    mine, other = (run["distill"]["distillation"] for run in told)
    assert mine["after"] < 0.99 * mine["before"]
    assert mine["after"] == pytest.approx(other["after"], rel=1e-4)
    for left, right in zip(mine["curve"], other["curve"], strict=True):
        assert left["step"] == right["step"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3)  # the same samples in each step
        assert left["held_out"] == pytest.approx(right["held_out"], rel=1e-3)
    assert mine["trained_parameters"] == other["trained_parameters"]


KILLED = """
import os
from pathlib import Path
from gradmap_pipeline import hookimpl
from gradmap_pipeline.correction import fitting, kept_state, training

kept_state.SECONDS = kept_state._WRITES = 0

def killing(function, times, name):
    count = 0
    def called(*arguments, **named):
        nonlocal count
        count += 1
        if os.environ["RANK"] == "1":
            Path(f"calls-{name}").write_text(str(count))
        if count == times and os.environ["RANK"] == "1" and not Path(name).exists():
            Path(name).touch()
            os.kill(os.getpid(), 9)
        return function(*arguments, **named)
    return called

fitting.Fitting._differentiate = killing(fitting.Fitting._differentiate, 4, "killed-refit")
training.mixed_loss = killing(training.mixed_loss, 17, "killed-distill")

@hookimpl
def gradmap_stages():
    return []
"""


def test_killed_processes_go_on_to_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    """One is killed inside a layer, then inside the training of the whole model; the other says so and ends."""
    whole = write_recipe(tmp_path / "whole", llama, text, refit=4)
    assert [end.code for end in run(whole)] == [0, 0]
    folder = write_recipe(tmp_path / "killed", llama, text, refit=4)
    (folder / "p.py").write_text(KILLED)
    for step, name in (("refit_layers", "killed-refit"), ("distill", "killed-distill")):
        ends = run(folder, 2, "--plugin", "p.py")
        assert [end.code for end in ends] == [4, -signal.SIGKILL], (step, ends)
        assert (folder / name).exists()
        if step == "refit_layers":
            assert len(list(folder.glob(".gradmap/**/state.json"))) == 1
    assert (folder / "calls-killed-refit").read_text() == str(3 * 6 - 3)  # three steps of three layers' six were kept
    assert list(folder.glob(".gradmap/**/checkpoint-*/complete"))
    ends = run(folder, 2, "--plugin", "p.py")
    assert [end.code for end in ends] == [0, 0], ends
    assert (folder / "calls-killed-distill").read_text() == str(8 + 2 * 3 + 8)  # a step and a look each, of three that were left
    assert not list(folder.glob(".gradmap/**/checkpoint-*"))
    for name in ("refit", "out"):
        assert (folder / name / "model.safetensors").read_bytes() == (whole / name / "model.safetensors").read_bytes()


NOT_FINITE = """
import os
from gradmap_pipeline import hookimpl
from gradmap_pipeline.correction import training

mixed_loss, calls = training.mixed_loss, 0

def other_loss(*arguments):
    global calls
    calls += 1
    return mixed_loss(*arguments) * (float("nan") if calls == 13 and os.environ["RANK"] == "1" else 1)

training.mixed_loss = other_loss

@hookimpl
def gradmap_stages():
    return []
"""


def test_loss_that_is_not_finite_in_one_process_ends_all(llama: Path, text: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, llama, text)
    (tmp_path / "p.py").write_text(NOT_FINITE)
    ends = run(tmp_path, 2, "--plugin", "p.py")
    assert [end.code for end in ends] == [4, 4], ends
    (message,) = ends[0].errors
    assert message.startswith("the loss is not finite at step 3 of 7; lower 'learning_rate'")
    assert not ends[1].errors


@pytest.mark.parametrize(("step", "batch", "refit"), [("distill", 9, 14), ("refit_layers", 8, 7)])
def test_steps_that_cannot_be_shared_are_refused_before_work(
    step: str, batch: int, refit: int, llama: Path, text: Path, tmp_path: Path
) -> None:
    ends = run(write_recipe(tmp_path, llama, text, batch=batch, refit=refit))
    assert {end.code for end in ends} == {2}, ends
    (error,) = [event for event in ends[0].events if event["event"] == "error"]
    assert f"step {step!r}, option 'batch_size'" in error["where"]
    assert error["message"].startswith(
        f"a step of {batch if step == 'distill' else refit} samples cannot be shared alike by 2 processes; set 'batch_size'"
    )
    assert not any(event["event"] == "step_finished" for event in ends[0].events)
