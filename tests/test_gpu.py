"""What only a GPU shows: speed against plain torch, and two ranks on NCCL. `tests/test_devices.py` has the rest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import RECIPE, outputs, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BENCHMARK = Path(__file__).parent / "benchmarks" / "sweep_speed.py"


def test_the_sweep_is_as_fast_as_plain_torch() -> None:
    """With graphs kept, and models and batches of a size at which the GPU is busy: the median of seven rounds in turn."""
    size = ["--samples", "64", "--length", "512", "--batch-tokens", "8192"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--device", "cuda:0", *size], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    ratio = re.search(r"^graphs kept +[0-9.]+ +([0-9.]+)", done.stdout, re.MULTILINE)
    assert ratio is not None
    assert float(ratio[1]) <= 1.05, done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("metric", ["gate_gradient", "weight_gradient"])
def test_two_ranks_on_nccl_decide_and_correct_as_one(metric: str, llama: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "r.yaml").write_text(RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)).replace("METRIC", metric))
        done = run(folder, processes, "--device", "cuda")
        assert done.returncode == 0, done.stderr
        found.append(outputs(done))
    one, two = found
    for mine, other in zip(*(made["gradmap_score"]["scores"]["decisions"] for made in found), strict=True):
        assert mine["removed"] == other["removed"]
        assert mine["scores"] == pytest.approx(other["scores"], rel=1e-3)
    for mine, other in zip(*(made["project_compensate"]["compensation"]["sites"] for made in found), strict=True):
        assert mine["missing_left"] == pytest.approx(other["missing_left"], rel=1e-3)
    assert one["evaluate"]["evaluation"]["loss"] == pytest.approx(two["evaluate"]["evaluation"]["loss"], rel=1e-4)
