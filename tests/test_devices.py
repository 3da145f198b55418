"""Tests on a device that is not the CPU run in a process of their own: on the stand-in device, and on a GPU where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "device"
GPU = pytest.param("cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="needs a C++ compiler and ninja"
)


def run_tests(file: str, device: str, *options: str) -> None:
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    environment = {**os.environ, "GRADMAP_TEST_DEVICE": device, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", str(FOLDER / file), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.full
@needs_compiler
def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    run_tests("refusals.py", "standin:0")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("device", ["standin:0", GPU])
def test_stages_give_what_they_give_on_the_cpu(device: str) -> None:
    run_tests("stages.py", device)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("device", ["standin:0", GPU])
def test_sweeps_keep_their_budgets_and_read_ahead_in_order(device: str) -> None:
    run_tests("sweeps.py", device)
