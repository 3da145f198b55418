"""What a recipe takes against what its plan says: `python tests/benchmarks/plan_against_run.py RECIPE [OPTION ...]`.

Plans, then runs the recipe in a process of its own and an empty store, with the options given. Prints seconds, bytes read and peak
resident memory of each step, planned and found, with the ratio found / planned. With `--preload`, the process imports before
the run what steps import, so that bytes are those of model and data, as a plan counts them; then seconds and peaks of the first
steps are not those of a run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

RUN = ("-m", "gradmap_pipeline")
_PRELOAD = """
import importlib, sys
for name in ("torch", "torch._dynamo", "datasets", "transformers.trainer", "transformers.models.auto.modeling_auto", "accelerate",
             "peft", "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama", "sklearn", "onnx"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
from gradmap_pipeline.cli import main
main()
"""


class Watch:
    """What a process reads, and its largest resident set, sampled every 10 ms."""

    def __init__(self, process: int) -> None:
        self.process = psutil.Process(process)
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> tuple[int, int]:
        """Bytes read so far, and the peak since the last call."""
        peak, self.peak = self.peak, 0
        try:
            return self.process.io_counters().read_chars, peak
        except psutil.Error:
            return 0, peak

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            try:
                self.peak = max(self.peak, self.process.memory_info().rss)
            except psutil.Error:
                return


def run(folder: Path, recipe: Path, options: list[str], start: Sequence[str] = RUN) -> list[tuple[str, float, int, int]]:
    """(step, seconds, bytes read, peak) of the opening of the model, and of each step. `start`: what Python runs."""
    command = [sys.executable, *start, "run", str(recipe), "--json", *options]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    watch, before, started = Watch(process.pid), 0, 0.0
    rows: list[tuple[str, float, int, int]] = []
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "run_started":
            before, _ = watch.take()
            started = time.monotonic()
        elif event["event"] == "step_started" and not rows:
            read, peak = watch.take()
            rows.append(("model", time.monotonic() - started, read - before, peak))
            before = read
        elif event["event"] == "step_finished":
            read, peak = watch.take()
            rows.append((event["step"], event["seconds"], read - before, peak))
            before = read
        elif event["event"] == "error":
            print(event["message"], file=sys.stderr)
    watch.stop()
    if process.wait():
        sys.exit(process.returncode)
    return rows


def plan(folder: Path, recipe: Path, options: list[str]) -> dict[str, dict[str, Any]]:
    """What the plan says each step takes."""
    command = [sys.executable, "-m", "gradmap_pipeline", "plan", str(recipe), "--json", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr or done.stdout)
    return {step["step"]: step["estimate"] for step in json.loads(done.stdout)["steps"]}


def compare(folder: Path, recipe: Path, options: list[str], start: Sequence[str] = RUN) -> None:
    """Plan and run a recipe in `folder`, and print both with the ratio run / plan."""
    shutil.rmtree(folder / ".gradmap", ignore_errors=True)
    started = time.monotonic()
    planned = plan(folder, recipe, options)
    print(f"planned in {time.monotonic() - started:.1f} s")
    print(f"{'':20} {'seconds':^22} {'GB read':^22} {'peak GiB':^22}")
    print(f"{'step':20}" + f" {'plan':>7}{'run':>8}{'ratio':>7}" * 3)
    rows = run(folder, recipe, options, start)
    units = (1.0, 1e9, 2.0**30)
    names = ("seconds", "bytes_read", "peak_bytes")
    totals = [sum(row[1] for row in rows), sum(row[2] for row in rows), max(row[3] for row in rows)]
    said = [sum(planned[row[0]][name] for row in rows) for name in ("seconds", "bytes_read")]
    said.append(max(planned[row[0]]["peak_bytes"] for row in rows))
    for step, *measured in rows:
        estimate = [planned[step][name] for name in names]
        print(f"{step:20}" + "".join(_cell(*pair) for pair in zip(estimate, measured, units, strict=True)))
    print(f"{'all':20}" + "".join(_cell(*pair) for pair in zip(said, totals, units, strict=True)))


def _cell(planned: float, measured: float, unit: float) -> str:
    ratio = f"{measured / planned:7.2f}" if planned else f"{'':7}"
    return f" {planned / unit:7.2f}{measured / unit:8.2f}{ratio}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        parser = argparse.ArgumentParser(description="A recipe's plan against its run. Other options go to both.")
        parser.add_argument("recipe", type=Path)
        parser.add_argument("--preload", action="store_true", help="import first what steps import")
        arguments, others = parser.parse_known_args()
        compare(Path(work), arguments.recipe.resolve(), others, ("-c", _PRELOAD) if arguments.preload else RUN)
