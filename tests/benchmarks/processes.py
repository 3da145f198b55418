"""One process against two that share the samples, a thread each: `python tests/benchmarks/processes.py`.

Runs calibrate, gradmap_score, prune, project_compensate and evaluate on the built-in model in fresh processes, in turn, and prints
the seconds of each step by the run's own clock, with the ratio of two processes to one.
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
model: {builtin: docs-llama}
steps:
  - use: calibrate
    with: {dataset: {builtin: calibration}, samples: SAMPLES, sequence_length: 256}
  - use: gradmap_score
  - use: prune
  - use: project_compensate
  - use: evaluate
    with: {dataset: {builtin: heldout}, samples: SAMPLES, sequence_length: 256}
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(processes: int, samples: int) -> tuple[dict[str, float], list[int]]:
    """Seconds by step, and the layers removed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "r.yaml").write_text(RECIPE.replace("SAMPLES", str(samples)))
        start = [sys.executable, *(TORCHRUN if processes > 1 else [])]
        command = [*start, "-m", "gradmap_pipeline", "run", "r.yaml", "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    events = [event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "step_finished"]
    decisions = next(event["outputs"]["scores"]["decisions"] for event in events if event["step"] == "gradmap_score")
    return {event["step"]: event["seconds"] for event in events}, [decision["removed"] for decision in decisions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds = [(run(1, arguments.samples), run(2, arguments.samples)) for _ in range(arguments.rounds)]
    assert all(one[1] == two[1] for one, two in rounds), "the decisions differ"
    print(f"{arguments.samples} x 256 tokens, {arguments.rounds} rounds, removed {rounds[0][0][1]}")
    print(f"{'step':20} {'one':>8} {'two':>8} {'ratio':>6}")
    for step in ("gradmap_score", "project_compensate", "evaluate"):
        one, two = (statistics.median(pair[number][0][step] for pair in rounds) for number in (0, 1))
        ratio = statistics.median(pair[1][0][step] / pair[0][0][step] for pair in rounds)
        print(f"{step:20} {one:8.1f} {two:8.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
