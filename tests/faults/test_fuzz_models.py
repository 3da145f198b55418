"""Configs and headers spoilt at random: each is refused in one line, or exported as transformers itself loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).with_name("mutations.py")
AT_ONCE = 100
"""Cases in one process."""


def run_cases(subject: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """What became of each case. A process that dies takes its case with it, and is a failure."""
    results: list[dict[str, Any]] = []
    for first in range(0, count, AT_ONCE):
        place = folder / str(first)
        place.mkdir()
        last = min(first + AT_ONCE, count)
        done = subprocess.run(
            [sys.executable, str(SCRIPT), subject, str(first), str(last), str(place)],
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        outcomes = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(outcomes) == last - first, (
            f"{subject} {first + len(outcomes)} ended the process ({done.returncode}): {done.stderr[-2000:]}"
        )
        results += outcomes
    return results


def explain(results: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(result) for result in results[:5])


def assert_ended_well(results: list[dict[str, Any]]) -> None:
    """Without a traceback, in time, with one of the documented codes; what was exported computes what transformers does."""
    broken = [result for result in results if "error" in result or result["code"] not in (0, 2, 3, 4)]
    assert not broken, explain(broken)
    unequal = [result for result in results if result["code"] == 0 and result["difference"] != 0.0]
    assert not unequal, explain(unequal)


@pytest.mark.slow
def test_a_thousand_spoilt_configs(tmp_path: Path) -> None:
    results = run_cases("config", 1000, tmp_path)
    assert_ended_well(results)
    codes = [result["code"] for result in results]
    assert codes.count(0) > 100
    assert codes.count(2) > 500


@pytest.mark.slow
def test_three_hundred_spoilt_headers(tmp_path: Path) -> None:
    """Accepted are those that the safetensors library accepts, if their tensors are the config's."""
    results = run_cases("header", 300, tmp_path)
    assert_ended_well(results)
    wrong = [result for result in results if (result["code"] == 0) != result["sound"]]
    assert not wrong, explain(wrong)
    late = [result for result in results if result["code"] not in (0, 2)]
    assert not late, explain(late)
    assert sum(result["sound"] for result in results) > 20


@pytest.mark.parametrize("subject", ["config", pytest.param("header", marks=pytest.mark.slow)])
def test_a_few_spoilt_models(subject: str, tmp_path: Path) -> None:
    assert_ended_well(run_cases(subject, 6, tmp_path))
