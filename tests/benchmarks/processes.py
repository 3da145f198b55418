"""Two processes of one thread against one process of one and of two threads: `python tests/benchmarks/processes.py`.

Runs calibrate, gradmap_score, prune, project_compensate and evaluate in fresh processes, in turn, and prints the seconds of each
step by the run's own clock, the ratios to one process of one thread, and the load of the machine before each run. `--model` names
a folder; by default it is the built-in model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = """\
version: 1
model: MODEL
steps:
  - use: calibrate
    with: {dataset: {builtin: calibration}, samples: SAMPLES, sequence_length: 256}
  - use: gradmap_score
    with: {layers: REMOVED}
  - use: prune
    with: {layers: REMOVED}
  - use: project_compensate
  - use: evaluate
    with: {dataset: {builtin: heldout}, samples: SAMPLES, sequence_length: 256}
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = {"one": (1, 1), "two threads": (1, 2), "two": (2, 1)}
"""Processes, and threads of each."""
STEPS = ("gradmap_score", "project_compensate", "evaluate")


def run(processes: int, threads: int, recipe: str) -> tuple[dict[str, float], list[int]]:
    """Seconds by step, and the layers removed."""
    print(f"load {os.getloadavg()[0]:.1f}: {processes} process(es) of {threads} thread(s)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "r.yaml").write_text(recipe)
        start = [sys.executable, *(TORCHRUN if processes > 1 else [])]
        command = [*start, "-m", "gradmap_pipeline", "run", "r.yaml", "--json", "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    events = [event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "step_finished"]
    decisions = next(event["outputs"]["scores"]["decisions"] for event in events if event["step"] == "gradmap_score")
    seconds = {event["step"]: event["seconds"] for event in events}
    seconds["scoring and correction"] = seconds["gradmap_score"] + seconds["project_compensate"]
    return seconds, [decision["removed"] for decision in decisions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--removed", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = "{builtin: docs-llama}" if arguments.model is None else f"{{path: {arguments.model.resolve()}}}"
    recipe = RECIPE.replace("MODEL", model).replace("SAMPLES", str(arguments.samples)).replace("REMOVED", str(arguments.removed))
    rounds = [{name: run(*way, recipe) for name, way in WAYS.items()} for _ in range(arguments.rounds)]
    assert all(each["one"][1] == each["two"][1] for each in rounds), "the decisions differ"
    print(f"{arguments.samples} x 256 tokens, {arguments.rounds} rounds, removed {rounds[0]['one'][1]}; median (least to most)")
    print(f"{'step':24} {'one':>8} {'two threads':>12} {'two':>8}  two / one")
    for step in (*STEPS, "scoring and correction"):
        medians = [statistics.median(each[name][0][step] for each in rounds) for name in WAYS]
        ratios = sorted(each["two"][0][step] / each["one"][0][step] for each in rounds)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{step:24} {medians[0]:8.1f} {medians[1]:12.1f} {medians[2]:8.1f}  {spread}")


if __name__ == "__main__":
    main()
