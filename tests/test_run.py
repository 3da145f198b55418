"""Whole runs through the command line: results, reuse, resume, machine-readable output, failures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.cli.command_options import check_dtype
from gradmap_pipeline.run.step_context import ReusedUnits, progress_of

RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: evaluate
    id: evaluate_dense
    with: {dataset: {path: TEXT}, samples: 8, sequence_length: 32}
  - use: calibrate
    with: {dataset: {path: TEXT}, samples: 8, sequence_length: 32}
  - use: gradmap_score
    with: {layers: 2}
  - use: prune
    with: {layers: 2}
  - use: evaluate
    id: evaluate_pruned
    with: {dataset: {path: TEXT}, samples: 8, sequence_length: 32}
  - use: project_compensate
  - use: evaluate
    with: {dataset: {path: TEXT}, samples: 8, sequence_length: 32}
  - use: export
    with: {to: out}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path) -> Path:
    """A folder with a recipe, to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)))
    return tmp_path


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def events(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def cached(result: Result) -> dict[str, bool]:
    return {event["step"]: event["cached"] for event in events(result) if event["event"] == "step_finished"}


def test_from_recipe_to_folder(folder: Path) -> None:
    result = gradmap("run", "r.yaml")
    assert result.exit_code == 0, result.stderr
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.num_hidden_layers == 2
    for row in ("dense", "pruned", "compensated"):
        assert any(line.split()[:1] == [row] for line in result.stdout.splitlines()), result.stdout
    assert "of the gap in log-perplexity" in result.stdout
    assert sorted(file.name for file in folder.iterdir()) == [".gradmap", "out", "r.yaml"]


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "opt"])
def test_same_recipe_on_other_architectures(folder: Path, tmp_path: Path, architecture: str) -> None:
    make_model(tmp_path / "model", architecture, tied=True)
    result = gradmap("run", "r.yaml", "--json", "--set", "model={path: model}")
    assert result.exit_code == 0, result.stdout
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.model_type == architecture


def test_moved_model_is_the_same_model(folder: Path, llama: Path, tmp_path: Path) -> None:
    """Results over a model serve wherever it lies, even when it is gone from where it was."""
    shutil.copytree(llama, tmp_path / "first")
    gradmap("run", "r.yaml", "--quiet", "--set", "model.path=first")
    (tmp_path / "first").rename(tmp_path / "second")
    result = gradmap("run", "r.yaml", "--json", "--set", "model.path=second", "--set", "export.to=again")
    assert result.exit_code == 0, result.stdout
    assert [step for step, reused in cached(result).items() if not reused] == ["export"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "gpu"], 2, "found 'gpu', accepted: auto, cpu, cuda, cuda:1"),
        (["--device", "cuda:99"], 3, "--device cuda:99: torch sees"),
        (["--dtype", "int8"], 2, "found 'int8', accepted: float32, bfloat16, float16; or fp32, bf16, fp16"),
        (["--threads", "0"], 2, "found 0, accepted: 1 to "),
    ],
)
def test_impossible_machine(folder: Path, arguments: list[str], code: int, message: str) -> None:
    result = gradmap("run", "r.yaml", *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(("short", "full"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_short_names_of_types(short: str, full: str) -> None:
    assert check_dtype(short) == check_dtype(full) == full


def test_json_events(folder: Path) -> None:
    told = events(gradmap("run", "r.yaml", "--json"))
    assert [event["event"] for event in told if event["event"] not in ("progress", "note")] == [
        "run_started",
        *["step_started", "computing", "step_finished"],
        *["step_started", "step_finished"] * 7,
        "run_finished",
    ]
    notes = [(event["step"], event["text"]) for event in told if event["event"] == "note"]
    assert ("export", "wrote out: 0.2 MB of files, loaded back, logits equal") in notes
    finished = {event["step"]: event for event in told if event["event"] == "step_finished"}
    figures = {"seconds", "computed_seconds", "metrics", "limits", "peak_bytes", "key", "folder", "time"}
    (place,) = [event for event in told if event["event"] == "computing"]
    assert (place["device"], place["dtype"], place["processes"]) == ("cpu", "float32", 1)
    assert place["store"] == str((folder / ".gradmap").resolve())
    assert finished["gradmap_score"].keys() == {"event", "step", "stage", "cached", "outputs", *figures}
    assert finished["gradmap_score"]["metrics"] == []
    kept = Path(finished["gradmap_score"]["folder"])
    assert json.loads((kept / "outputs.json").read_text())["key"] == finished["gradmap_score"]["key"]
    (metric,) = finished["evaluate"]["metrics"]
    assert metric["value"] == finished["evaluate"]["outputs"]["evaluation"]["perplexity"]
    decisions = finished["gradmap_score"]["outputs"]["scores"]["decisions"]
    assert [len(decision["scores"]) for decision in decisions] == [4, 3]
    assert finished["evaluate"]["outputs"]["evaluation"]["perplexity"] > 1
    assert [row["label"] for row in told[-1]["summary"]["models"]] == ["dense", "pruned", "compensated"]


def test_second_run_computes_nothing(folder: Path) -> None:
    """In a new process, which does not even import torch."""
    first = gradmap("run", "r.yaml", "--json")
    assert not any(cached(first).values())
    started = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "gradmap_pipeline", "run", "r.yaml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 30
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "gradmap_pipeline.run.runner" in imported
    assert "torch" not in imported
    second = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(event["cached"] for event in second if event["event"] == "step_finished")
    outputs = [[event["outputs"] for event in told if event["event"] == "step_finished"] for told in (events(first), second)]
    assert outputs[0] == outputs[1]


def test_changed_ratio_reuses_scores(folder: Path) -> None:
    gradmap("run", "r.yaml", "--quiet")
    result = cached(gradmap("run", "r.yaml", "--json", "--set", "prune.layers=1"))
    assert {step for step, reused in result.items() if reused} == {"evaluate_dense", "calibrate", "gradmap_score"}
    said = gradmap("run", "r.yaml", "--set", "prune.layers=1").stdout
    assert "gradmap_score: done (from the store)" in said


def test_a_result_from_the_store_has_the_name_of_now(folder: Path, text: Path, tmp_path: Path) -> None:
    """Texts count by content: one of equal content is not evaluated again, and is told by its own name."""
    gradmap("run", "r.yaml", "--quiet")
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes())
    result = gradmap("run", "r.yaml", "--json", "--set", f"evaluate_dense.dataset.path={other}")
    assert cached(result)["evaluate_dense"]
    ended = {event["step"]: event["outputs"] for event in events(result) if event["event"] == "step_finished"}
    assert ended["evaluate_dense"]["evaluation"]["dataset"] == str(other)
    table = next(event for event in events(result) if event["event"] == "run_finished")["summary"]["models"]
    assert table[0]["metrics"][f"perplexity on {other}"]["on"] == str(other)


@pytest.mark.full
def test_what_a_step_depends_on_runs_it_again(folder: Path, text: Path, tmp_path: Path) -> None:
    gradmap("run", "r.yaml", "--quiet")
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text.read_bytes())
    assert all(cached(gradmap("run", "r.yaml", "--json", "--set", f"calibrate.dataset.path={moved}")).values())
    moved.write_text("changed " + text.read_text())
    assert not cached(gradmap("run", "r.yaml", "--json", "--set", f"calibrate.dataset.path={moved}"))["calibrate"]
    assert not cached(gradmap("run", "r.yaml", "--json", "--set", "seed=1"))["calibrate"]
    assert not cached(gradmap("run", "r.yaml", "--json", "--dtype", "bfloat16"))["evaluate_dense"]


def test_same_recipe_in_another_folder_writes_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradmap("run", "r.yaml", "--store", str(tmp_path / "shared")).exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.copy("r.yaml", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = cached(gradmap("run", "r.yaml", "--store", str(tmp_path / "shared"), "--json"))
    assert [step for step, taken in again.items() if not taken] == ["export"]
    assert (tmp_path / "elsewhere" / "out" / "config.json").is_file()


def test_two_exports_to_one_folder(folder: Path) -> None:
    text = (folder / "r.yaml").read_text()
    (folder / "two.yaml").write_text(text + "  - use: export\n    id: again\n    with: {to: ./out}\n")
    result = gradmap("check", "two.yaml")
    assert result.exit_code == 2
    assert "step 'again' writes 'out', which is, holds or lies in what step 'export' writes; choose another folder" in result.stderr


def test_export_type_is_what_is_evaluated(folder: Path) -> None:
    """model.dtype rounds the weights on export, so the perplexity is that of rounded weights."""
    perplexities = []
    for dtype in ("float32", "bfloat16"):
        result = gradmap("run", "r.yaml", "--json", "--set", f"model.dtype={dtype}")
        event = next(event for event in events(result) if event.get("step") == "evaluate_dense" and "outputs" in event)
        perplexities.append(event["outputs"]["evaluation"]["perplexity"])
    assert perplexities[0] != perplexities[1]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.05)


def test_deleted_export_is_written_again(folder: Path) -> None:
    gradmap("run", "r.yaml", "--quiet")
    (folder / "out" / "config.json").unlink()
    result = cached(gradmap("run", "r.yaml", "--json"))
    assert [step for step, reused in result.items() if not reused] == ["export"]
    assert (folder / "out" / "config.json").is_file()


def test_interruption_keeps_what_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted during the second decision, a run goes on with the second decision."""
    from gradmap_plugins.gradmap_score import GradmapScore

    score, calls = GradmapScore._score_updates, []

    def interrupt_second(self: GradmapScore, sweep: Any) -> Any:
        calls.append(len(sweep.layers))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, sweep)

    monkeypatch.setattr(GradmapScore, "_score_updates", interrupt_second)
    result = gradmap("run", "r.yaml")
    assert result.exit_code == 130
    assert "error: interrupted; what is finished is kept: run the same command to go on" in result.stderr
    assert not list((folder / ".gradmap" / "steps").glob("*partial*"))
    result = gradmap("run", "r.yaml", "--json")
    assert result.exit_code == 0
    assert calls == [4, 3, 3]
    assert cached(result)["calibrate"]


def test_quality_limit(folder: Path) -> None:
    result = gradmap("run", "r.yaml", "--set", "evaluate.max_perplexity=2")
    assert result.exit_code == 5
    assert "error: step 'evaluate': perplexity" in result.stderr
    assert "is over max_perplexity 2; remove fewer layers" in result.stderr
    assert not (folder / "out").exists()
    again = gradmap("run", "r.yaml", "--json", "--set", "evaluate.max_perplexity=1e9")
    assert again.exit_code == 0
    assert cached(again)["project_compensate"]


def test_error_as_json(folder: Path) -> None:
    result = gradmap("run", "r.yaml", "--json", "--set", "evaluate.max_perplexity=2")
    error = events(result)[-1]
    assert (error["event"], error["exit_code"], error["where"]) == ("error", 5, "step 'evaluate'")
    assert result.stderr == ""
    result = gradmap("run", "r.yaml", "--json", "--set", "prune.layers=9")
    (error,) = events(result)
    assert (error["exit_code"], error["where"]) == (2, "--set prune.layers=9")


def test_quiet_says_nothing(folder: Path) -> None:
    result = gradmap("run", "r.yaml", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_failing_stage(folder: Path, llama: Path) -> None:
    (folder / "fails.py").write_text(FAILING)
    (folder / "f.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: fail\n")
    result = gradmap("run", "f.yaml", "--plugin", "fails.py")
    assert result.exit_code == 4
    traceback = folder / ".gradmap" / "traceback.txt"
    message = f"stage 'fail' (fails.py) failed: ZeroDivisionError: division by zero; traceback in {traceback}"
    assert result.stderr == f"error: step 'fail': {message}\n"
    assert 'fails.py", line 14, in run' in traceback.read_text()
    result = gradmap("run", "f.yaml", "--plugin", "fails.py", "--set", "fail.how=type")
    assert result.stderr == "error: step 'fail': run() of stage 'fail' (fails.py) must return its Outputs, got 1\n"
    assert not list((folder / ".gradmap" / "steps").iterdir())


FAILING = '''
from pydantic import BaseModel, Field
from gradmap_pipeline import ModelGraph, Stage, hookimpl

class Fail(Stage):
    """Fail."""
    name = "fail"
    how: str = Field("raise", description="In which way.")
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        return 1 / 0 if self.how == "raise" else 1

@hookimpl
def gradmap_stages():
    return [Fail]
'''


@pytest.mark.full
def test_killed_run_leaves_no_finished_step(folder: Path) -> None:
    """kill -9 in the middle of a step: nothing looks finished, and the next run cleans up and goes on."""
    plugin = FAILING.replace("return 1 / 0", "__import__('os').kill(__import__('os').getpid(), 9); return 1")
    (folder / "kills.py").write_text(plugin)
    text = (folder / "r.yaml").read_text()
    (folder / "k.yaml").write_text(text.replace("  - use: project_compensate", "  - use: fail\n  - use: project_compensate"))
    command = [sys.executable, "-m", "gradmap_pipeline", "run", "k.yaml", "--plugin", "kills.py", "--quiet"]
    assert subprocess.run(command, check=False).returncode == -9
    assert len(list((folder / ".gradmap" / "steps").glob(".fail-*.partial-*.lock"))) == 1
    result = gradmap("run", "r.yaml", "--json")
    assert result.exit_code == 0
    assert cached(result)["evaluate_pruned"]
    assert not list((folder / ".gradmap" / "steps").glob("*.partial-*"))


def test_plan_and_check(folder: Path) -> None:
    shown = gradmap("plan", "r.yaml").stdout
    assert "4 layers" in shown
    assert "2 decisions" in shown
    assert "2 layers" in shown
    assert not (folder / ".gradmap").exists()
    assert gradmap("check", "r.yaml").stdout == "r.yaml: no problems in 8 steps\n"
    assert sorted(file.name.partition("-")[0] for file in (folder / ".gradmap").rglob("*.json")) == ["check", "structure"]


def test_an_export_says_what_it_takes_the_place_of(folder: Path) -> None:
    gradmap("run", "r.yaml")
    (folder / "r.yaml").write_text((folder / "r.yaml").read_text().replace("layers: 2", "layers: 1"))
    again = gradmap("run", "r.yaml")
    assert again.exit_code == 0, again.output
    assert "wrote out in place of an export of 2 layers: 0." in again.stdout


def test_what_a_step_of_the_same_run_has_computed_is_of_no_earlier_run(folder: Path) -> None:
    first = gradmap("run", "r.yaml", "--set", "evaluate.max_perplexity_ratio=100000")
    assert first.exit_code == 0, first.output
    assert "goes on with" not in first.stdout
    again = gradmap("run", "r.yaml", "--set", "evaluate.max_perplexity_ratio=90000")
    assert again.exit_code == 0, again.output
    assert "goes on with what an earlier run has finished" in again.stdout


def test_what_is_kept_is_told_and_says_nothing_of_the_speed() -> None:
    told: list[Any] = []

    class Listener:
        def progress(self, event: Any) -> None:
            told.append((event.done, event.rate))

        def progress_ended(self, step: str, description: str) -> None:
            pass

    notes: list[str] = []
    reused = ReusedUnits(notes.append)
    with progress_of("score", Listener(), reused)("score layers", 4, "decision") as advance:  # type: ignore[arg-type]
        for _ in range(2):
            reused.add(10.0)
            advance()
        assert [rate for _, rate in told] == [None, None, None]
        time.sleep(0.05)
        advance()
    assert notes == ["goes on with what an earlier run has finished"]
    done, rate = told[-1]
    assert done == 3
    assert 0.05 <= 1 / rate < 5
    assert reused.seconds == [10.0, 10.0]
