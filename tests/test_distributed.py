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
from ranks import Ended, run_ranks, torchrun_variables

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


def run(folder: Path, processes: int) -> Ended:
    """The leading process of a run."""
    ends = run_ranks(folder, ["run", "r.yaml", "--json"], torchrun_variables() if processes > 1 else [{}])
    assert [end.code for end in ends] == [0] * processes, ends
    return ends[0]


def outputs(done: Ended) -> dict[str, Any]:
    return {event["step"]: event["outputs"] for event in done.events if event["event"] == "step_finished"}


@pytest.mark.parametrize("metric", ["gate_gradient", "weight_gradient"])
def test_two_processes_decide_and_correct_as_one(metric: str, llama: Path, text: Path, tmp_path: Path) -> None:
    scores = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        recipe = RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)).replace("METRIC", metric)
        (folder / "r.yaml").write_text(recipe)
        scores.append(outputs(run(folder, processes)))
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
    run(tmp_path, 2)
    again = run(tmp_path, 2)
    assert all(event["cached"] for event in again.events if event["event"] == "step_finished")


COMMANDS = [
    line for line in (Path(__file__).parent.parent / "docs" / "recipes.md").read_text().splitlines()
    if line.startswith(("torchrun ", "accelerate launch "))
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_commands_of_the_docs_run_two_processes(command: str, llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)).replace("METRIC", "gate_gradient")
    (tmp_path / "r.yaml").write_text(recipe)
    (tmp_path / "p.py").write_text(SHARES)
    words = command.replace(" 8 ", " 2 ").replace("recipe.yaml", "r.yaml").split()
    words[0] = str(Path(sys.executable).parent / words[0])
    done = subprocess.run(
        [*words, "--device", "cpu", "--json", "--plugin", "p.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()][-1] == "run_finished"
    assert {(tmp_path / f"share-{rank}").read_text() for rank in range(2)} == {"2 4", "2 3"}
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_docs_name_both_commands() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["torchrun", "accelerate"]


SHARES = """
from gradmap_pipeline import hookimpl
from gradmap_plugins import evaluate
score_text = evaluate.score_text
def noted(model, ids, mask, context):
    with open(f"share-{context.group.rank}", "w") as file:
        file.write(f"{context.group.size} {len(context.group.share(ids))}")
    return score_text(model, ids, mask, context)
evaluate.score_text = noted
@hookimpl
def gradmap_stages():
    return []
"""


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
