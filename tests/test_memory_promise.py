"""Memory allowed is memory kept to: peaks, reads and writes of processes of their own, as the system counts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_text

MIB = 1 << 20
COUNTERS = """
import json, sys
from pathlib import Path
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.machine.memory import give_back, tune_allocator

def read(file, field):
    return int(next(line for line in Path(file).read_text().splitlines() if line.startswith(field + ":")).split()[1])

tune_allocator(is_tight=True)
"""
STAGE = (
    COUNTERS
    + """
from gradmap_pipeline.testing import make_context, run_stage
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.evaluate import Evaluate
from gradmap_plugins.gradmap_score import GradmapScore

folder, method, samples, tokens, room = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])

def run(model, place, samples, tokens, allowed):
    text = {"dataset": {"path": folder / "text.txt"}, "samples": samples, "sequence_length": tokens}
    stage, inputs = Evaluate.model_validate(text), {"model": model}
    if method != "evaluate":
        calibration = run_stage(Calibrate.model_validate(text), place / "calibration", model=model).calibration
        stage = GradmapScore(metric=method, schedule="one_shot", layers=1, sample_share=1.0)
        inputs["calibration"] = calibration
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the system forgets the peak
    resident, *moved = read("/proc/self/status", "VmRSS") << 10, read("/proc/self/io", "rchar"), read("/proc/self/io", "wchar")
    outputs = stage.run(stage.Inputs(**inputs), make_context(place, memory=resident + allowed))
    return {
        "peak": (read("/proc/self/status", "VmHWM") << 10) - resident,
        "read": read("/proc/self/io", "rchar") - moved[0],
        "written": read("/proc/self/io", "wchar") - moved[1],
        "values": [outputs.evaluation.loss] if method == "evaluate" else list(outputs.scores.decisions[0].scores.values()),
    }

run(open_folder(folder / "small"), folder / f"first-{method}-{room}", 4, 16, 1 << 40)  # from here on, libraries are in memory
print(json.dumps(run(open_folder(folder / "model"), folder / f"{method}-{room}", samples, tokens, room << 20)))
"""
)
SAVED = (
    COUNTERS
    + """
import torch
from gradmap_pipeline.batches import Batch
from gradmap_pipeline.sweep.needs import measure_needs
from gradmap_pipeline.sweep.layerwise import LayerwiseModel

tokens = int(sys.argv[2])
model = LayerwiseModel(open_folder(Path(sys.argv[1])))
said = measure_needs(model, 1, tokens).saved_bytes
hidden, arguments = model.record(Batch(torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens, dtype=torch.bool)))
hidden = hidden.requires_grad_()
with model.layer(0):
    give_back()
    before = read("/proc/self/status", "VmRSS")
    with torch.enable_grad():
        output = model.run_layer(0, hidden, arguments[0])
    give_back()
    print(json.dumps({"said": said, "grown": (read("/proc/self/status", "VmRSS") - before) << 10}))
"""
)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the counters of /proc are Linux's")


def run_program(program: str, *arguments: Path | str | int) -> dict[str, Any]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def make_folder(folder: Path, **sizes: int) -> Path:
    make_model(folder / "small")
    make_model(folder / "model", **sizes)
    make_text(folder / "text.txt", 40000)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of 16 MiB."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "head_dim": 64}
    return make_folder(tmp_path_factory.mktemp("wide"), **sizes, num_key_value_heads=8)


@pytest.mark.full
@pytest.mark.parametrize("method", ["evaluate", "gate_gradient"])
def test_weights_stay_below_the_memory_allowed(method: str, wide: Path) -> None:
    """Layers that do not fit together are read once a pass, and what is computed is the same."""
    weights, passes = 12 * 16 * MIB, 1 if method == "evaluate" else 2
    narrow, roomy = (run_program(STAGE, wide, method, 4, 16, room) for room in (180, 600))
    assert narrow["peak"] < 180 * MIB < weights < roomy["peak"] < 600 * MIB
    assert weights < roomy["read"] < 1.25 * weights  # one layer is read before, to measure what it needs
    assert passes * weights < narrow["read"] < (passes + 0.25) * weights
    assert narrow["values"] == pytest.approx(roomy["values"], rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("metric", "room"), [("gate_gradient", 120), pytest.param("weight_gradient", 200, marks=pytest.mark.slow)])
def test_hidden_states_stay_below_the_memory_allowed(metric: str, room: int, tmp_path: Path) -> None:
    """Samples whose scores add up go in parts; those that belong together leave hidden states in a file."""
    folder = make_folder(tmp_path, hidden_size=64, intermediate_size=64, num_hidden_layers=3)
    narrow, roomy = (run_program(STAGE, folder, metric, 2048, 64, allowed) for allowed in (room, 2000))
    assert roomy["written"] < MIB
    assert (narrow["written"] > MIB) == (metric == "weight_gradient")
    assert narrow["values"] == pytest.approx(roomy["values"], rel=1e-5)
    assert narrow["peak"] < room * MIB < roomy["peak"] < 2000 * MIB


@pytest.mark.full
def test_memory_that_autograd_takes_is_what_a_plan_counts(tmp_path: Path) -> None:
    """A process grows by so much when it runs a layer and keeps its graph."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 64}
    make_model(tmp_path, **sizes, num_key_value_heads=8, max_position_embeddings=2048)
    counted = run_program(SAVED, tmp_path, 2048)
    assert counted["grown"] > 60 * MIB
    assert counted["said"] == pytest.approx(counted["grown"], rel=0.15)
