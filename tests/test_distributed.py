"""Two processes do what one does: the same decisions, the same correction, and no hang when one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun import run_python

from gradmap_pipeline import StageError
from gradmap_pipeline.machine.distributed import ProcessGroup

pytestmark = pytest.mark.full

RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: calibrate
    with: {dataset: {path: TEXT}, samples: 7, sequence_length: 32}
  - use: gradmap_score
    with: {layers: 2, metric: METRIC, protect_first: 0, protect_last: 0}
  - use: prune
    with: {layers: 2}
  - use: project_compensate
  - use: evaluate
    with: {dataset: {path: TEXT}, samples: 7, sequence_length: 32}
  - use: export
    with: {to: out}
"""


def run(folder: Path, processes: int, *options: str) -> subprocess.CompletedProcess[str]:
    return run_python(folder, processes, "-m", "gradmap_pipeline", "run", "r.yaml", "--json", *options)


def outputs(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return {event["step"]: event["outputs"] for event in events if event["event"] == "step_finished"}


@pytest.mark.parametrize("metric", ["gate_gradient", "weight_gradient"])
def test_two_processes_decide_and_correct_as_one(metric: str, llama: Path, text: Path, tmp_path: Path) -> None:
    scores = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        recipe = RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)).replace("METRIC", metric)
        (folder / "r.yaml").write_text(recipe)
        done = run(folder, processes)
        assert done.returncode == 0, done.stderr
        scores.append(outputs(done))
        assert (folder / "out" / "model.safetensors").is_file()
        assert not list((folder / ".gradmap" / "steps").glob(".*"))
    one, two = scores
    for mine, other in zip(*(run["gradmap_score"]["scores"]["decisions"] for run in scores), strict=True):
        assert mine["removed"] == other["removed"]
        assert mine["scores"] == pytest.approx(other["scores"], rel=1e-5)
    for mine, other in zip(*(run["project_compensate"]["compensation"]["sites"] for run in scores), strict=True):
        assert mine["shift"] == pytest.approx(other["shift"], rel=1e-4)
        assert mine["missing_left"] == pytest.approx(other["missing_left"], rel=1e-4)
    assert one["evaluate"]["evaluation"]["loss"] == pytest.approx(two["evaluate"]["evaluation"]["loss"], rel=1e-6)
    assert one["evaluate"]["evaluation"]["tokens"] == two["evaluate"]["evaluation"]["tokens"]


def test_second_run_of_two_computes_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)).replace("METRIC", "gate_gradient")
    (tmp_path / "r.yaml").write_text(recipe)
    assert run(tmp_path, 2).returncode == 0
    again = run(tmp_path, 2)
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert all(event["cached"] for event in events if event["event"] == "step_finished")


def test_shares_are_disjoint_and_complete() -> None:
    samples = torch.arange(7)
    shares = [ProcessGroup(rank, 3).share(samples).tolist() for rank in range(3)]
    assert sorted(sample for share in shares for sample in share) == list(range(7))
    with pytest.raises(StageError, match="2 samples cannot be shared by 3 processes; start fewer, or use more samples"):
        ProcessGroup(0, 3).share(samples[:2])


def test_one_process_needs_no_others() -> None:
    assert ProcessGroup().sum_values({"a": 1.0}) == {"a": 1.0}
    assert ProcessGroup().tell([1]) == [1]
    assert torch.equal(ProcessGroup().sum(torch.ones(2)), torch.ones(2))
