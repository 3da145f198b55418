"""Seconds of GradMAP and its peers, each in a process of its own, in turn: `peer_times.py [FOLDER] [--rounds 3]`.

On the built-in model, or one in FOLDER: a quarter of the layers, 128 x 256 tokens of the built-in calibration text, one thread.
Prints the median and range of the seconds that scoring and correcting take (without import, reading of text, and evaluation),
their ratio to GradMAP's, and the memory that they add to what the process had before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

METHODS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "GradMAP": [("gradmap_score", {}), ("project_compensate", {})],
    "GradMAP, scores alone": [("gradmap_score", {})],
    "SLEB as published": [("sleb_score", {"prefix": "computed"})],
    "SLEB, prefix kept": [("sleb_score", {})],
    "ShortGPT": [("shortgpt_score", {})],
    "Taylor+": [("taylor_score", {})],
    "ReplaceMe": [("angular_score", {}), ("replaceme_compensate", {})],
    "MKA": [("mka_merge", {})],
}


def run_method(name: str, folder: Path | None) -> None:
    """In the process that is timed."""
    import resource

    import torch

    from gradmap_pipeline.checkpoint.graph import open_folder
    from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
    from gradmap_pipeline.machine.memory import resident_bytes
    from gradmap_pipeline.recipe.catalog import load_catalog
    from gradmap_pipeline.testing import run_stage

    torch.set_num_threads(1)
    stages, graph = load_catalog().stages, open_folder(folder or BUILTIN_FOLDER)
    with tempfile.TemporaryDirectory() as place:
        options = {"dataset": {"builtin": "calibration"}, "samples": 128, "sequence_length": 256}
        calibration = run_stage(stages["calibrate"].model_validate(options), Path(place), model=graph).calibration
        before, seconds = resident_bytes(), 0.0
        for stage_name, chosen in METHODS[name]:
            stage = stages[stage_name].model_validate(chosen)
            started = time.perf_counter()
            result = run_stage(stage, Path(place) / stage_name, model=graph, calibration=calibration)
            seconds += time.perf_counter() - started
            if hasattr(result, "scores"):
                graph = graph.without_layers(result.scores.order)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"seconds": seconds, "added": max(0, peak - before)}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time GradMAP and its peers.")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        run_method(arguments.method, arguments.folder)
        return
    times: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    folder = [str(arguments.folder)] if arguments.folder else []
    for _ in range(arguments.rounds):
        for name, results in times.items():
            command = [sys.executable, __file__, *folder, "--method", name]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    base = [result["seconds"] for result in times["GradMAP"]]
    print("| method | seconds, median (range) | over GradMAP, median (range) | memory added, MiB |\n|---|---|---|---|")
    for name, results in times.items():
        seconds = [result["seconds"] for result in results]
        ratios = [one / other for one, other in zip(seconds, base, strict=True)]
        memory = median(result["added"] for result in results) / 2**20
        spans = [f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in (seconds, ratios)]
        print(f"| {name} | {' | '.join(spans)} | {memory:.0f} |")


if __name__ == "__main__":
    main()
