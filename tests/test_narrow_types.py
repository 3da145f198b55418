"""A plan and a run warn of a type that the processor is slow in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_text
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.cost import narrow_types
from gradmap_pipeline.cost.narrow_types import tell_slow_type
from gradmap_pipeline.report.cost_table import print_costs
from gradmap_pipeline.run.costs import PlanCosts

SLOW = (
    "this processor is slow in bfloat16: products of matrices take about 8 times as long as in float32, those for gradients about "
    "70 times; --dtype float32 is faster where memory allows it"
)
RECIPE = """\
version: 1
model: {path: model}
steps:
  - use: calibrate
    with: {dataset: {path: text.txt}, samples: 8, sequence_length: 24}
  - use: shortgpt_score
  - use: prune
    with: {layers: 1}
"""


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Return a function that sets how many times as long as in float32 both products take: forward, and for gradients."""

    def pretend(forward: float, backward: float) -> None:
        times = {torch.nn.functional.linear: forward, torch.mm: backward}
        monkeypatch.setattr(narrow_types, "_compare_types", lambda multiply, dtype: times[multiply])

    return pretend


@pytest.mark.parametrize(
    ("forward", "backward", "told"), [(8.4, 71.0, SLOW), (0.5, 0.5, None), (1.4, 1.4, None)], ids=["none", "with", "emulated"]
)
def test_a_type_without_instructions_is_told(
    forward: float, backward: float, told: str | None, take: Callable[[float, float], None]
) -> None:
    take(forward, backward)
    assert tell_slow_type("cpu", "bfloat16") == told


def test_gradients_alone_may_be_slow(take: Callable[[float, float], None]) -> None:
    take(0.6, 12.0)
    told = tell_slow_type("cpu", "float16")
    assert told is not None
    assert "slow in float16: products of matrices take about 0.6 times as long as in float32, those for gradients about 10 " in told


def test_neither_float32_nor_another_device_is_timed(take: Callable[[float, float], None]) -> None:
    take(9.0, 9.0)
    assert tell_slow_type("cpu", "float32") is None
    assert tell_slow_type("cuda:0", "bfloat16") is None


def test_types_are_compared_by_the_least_time_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this test moves when matrices are multiplied."""
    now, delays = 0.0, iter([0.0, 5.0] + [0.0] * 98)  # the second product waits for a core
    monkeypatch.setattr(narrow_types.time, "perf_counter", lambda: now)

    def multiply(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += (6.0 if one.dtype == torch.bfloat16 else 2.0) + next(delays)
        return one

    assert narrow_types._compare_types(multiply, "bfloat16") == 3.0


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        told = tell_slow_type("cpu", "bfloat16")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert told is None or told.startswith("this processor is slow in bfloat16: ")


def test_a_plan_tells_it_last(capsys: pytest.CaptureFixture[str]) -> None:
    print_costs(PlanCosts(8 << 30, [], slow_type=SLOW))
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.endswith(f"This{SLOW.removeprefix('this')}.")


def test_a_plan_and_a_run_tell_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[[float, float], None]) -> None:
    """The run gives a note of the first step that is computed, and no note where none is computed."""
    take(8.4, 71.0)
    make_model(tmp_path / "model")
    make_text(tmp_path / "text.txt")
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return result.stdout

    def notes(*arguments: str) -> list[tuple[str, str]]:
        events = [json.loads(line) for line in call("run", "r.yaml", *arguments).splitlines()]
        return [(event["step"], event["text"]) for event in events if event["event"] == "note" and event["text"] == SLOW]

    assert json.loads(call("plan", "r.yaml", "--dtype", "bf16"))["slow_type"] == SLOW
    assert json.loads(call("plan", "r.yaml"))["slow_type"] is None
    assert notes("--dtype", "bf16") == [("calibrate", SLOW)]
    assert notes("--dtype", "bf16") == []
    assert notes() == []
