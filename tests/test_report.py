"""What people and programs are told: tables, lines, bars, JSON, and the card of an exported model."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import select
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gradmap_pipeline import Artifact, Evaluation, Metric, ModelGraph, TensorFile, __version__
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cost.estimate import Estimate
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.plan import make_plan
from gradmap_pipeline.recipe.recipe import load_recipe
from gradmap_pipeline.report import cost_table, plan_table, reporters
from gradmap_pipeline.report.comparison_files import print_comparison
from gradmap_pipeline.report.console import make_console, wrap_words
from gradmap_pipeline.report.log_file import LoggingReporter
from gradmap_pipeline.report.reporters import JsonReporter, LineReporter, QuietReporter, format_rate
from gradmap_pipeline.report.summary_tables import print_models, print_summary
from gradmap_pipeline.run.comparison import Comparison, Row
from gradmap_pipeline.run.costs import PlanCosts, StepCost
from gradmap_pipeline.run.events import Place, Progress, RunFinished, RunStarted, StepFinished
from gradmap_pipeline.run.measured import Measured, read_metrics
from gradmap_pipeline.run.summary import ModelRow, StepRow, Summary, summarise
from gradmap_pipeline.text import format_seconds, shorten_titles


@pytest.fixture
def dense(llama: Path) -> ModelGraph:
    return open_folder(llama)


def evaluate(model: ModelGraph, perplexity: float, dataset: str = "text") -> Evaluation:
    return Evaluation(
        model=model.digest,
        label=model.label,
        dataset=dataset,
        perplexity=perplexity,
        loss=math.log(perplexity),
        tokens=100,
        samples=4,
        sequence_length=26,
        layers=len(model.layers),
        parameters=model.count_parameters(),
        bytes=model.size_bytes,
    )


def summarise_outputs(outputs: dict[str, dict[str, Artifact]], finished: list[StepFinished]) -> Summary:
    measured = [Measured(step, metric) for step, artifacts in outputs.items() for metric in read_metrics(artifacts)]
    return summarise(outputs, measured, finished)


def values_of(row: ModelRow) -> dict[str, float]:
    return {column: metric.value for column, metric in row.metrics.items()}


@pytest.fixture
def summary(dense: ModelGraph, tmp_path: Path) -> Summary:
    """Dense 10, pruned 40, compensated 20 on one text; two of the three on another."""
    pruned = dense.without_layers([1])
    name = "model.layers.0.mlp.down_proj.weight"
    patch = TensorFile.save({name: torch.zeros(32, 64)}, tmp_path / "patch.safetensors")
    corrected = pruned.with_patches({name: patch}, "compensated")
    outputs: dict[str, dict[str, Artifact]] = {
        "model": {"model": dense},
        "evaluate_dense": {"evaluation": evaluate(dense, 10.0)},
        "again": {"evaluation": evaluate(dense, 12.0, "other")},
        "prune": {"model": pruned},
        "evaluate_pruned": {"evaluation": evaluate(pruned, 40.0)},
        "project_compensate": {"model": corrected},
        "evaluate": {"evaluation": evaluate(corrected, 20.0)},
        "last": {"evaluation": evaluate(corrected, 24.0, "other")},
    }
    return summarise_outputs(
        outputs, [StepFinished("prune", "prune", False, 0.25, 0.25, {}), StepFinished("evaluate", "evaluate", True, 0.0, 0.5, {})]
    )


def test_summary_has_one_row_a_model(summary: Summary, dense: ModelGraph) -> None:
    assert [(row.label, row.step, row.layers) for row in summary.models] == [
        ("dense", "model", 4),
        ("pruned", "prune", 3),
        ("compensated", "project_compensate", 3),
    ]
    text, other = "perplexity on text", "perplexity on other"
    assert [values_of(row) for row in summary.models] == [{text: 10, other: 12}, {text: 40}, {text: 20, other: 24}]
    assert summary.columns == [text, other]
    assert summary.models[0].parameters == dense.count_parameters()


def test_closed_gap_is_a_share_of_log_perplexity(summary: Summary) -> None:
    ((dataset, row, share),) = summary.closed_gaps()
    assert (dataset, row.step) == ("text", "project_compensate")
    assert share == pytest.approx(0.5)  # log(40/20) of log(40/10)


def test_shares_of_corrections_that_follow_each_other_add_up(dense: ModelGraph, tmp_path: Path) -> None:
    pruned, outputs = dense.without_layers([1]), {"model": {"model": dense}, "dense": {"evaluation": evaluate(dense, 10.0)}}
    patches: dict[str, TensorFile] = {}
    for step, perplexity in (("prune", 40.0), ("correct", 20.0), ("refit", 16.0)):
        model = pruned.with_patches(patches, step)
        outputs[step] = {"model": model, "evaluation": evaluate(model, perplexity)}
        name = sorted(dense.base.tensors)[len(patches)]
        patches[name] = TensorFile.save({name: torch.zeros(dense.stored_tensor(name).shape)}, tmp_path / f"{name}.safetensors")
    shares = [share for _, _, share in summarise_outputs(outputs, []).closed_gaps()]
    assert shares == pytest.approx([0.5, math.log(20 / 16) / math.log(4)])


def test_alternatives_are_no_repairs(dense: ModelGraph) -> None:
    """Two prunings side by side, and a pruned model without a dense one beside it, close no gap."""
    first, second = dense.without_layers([1]), dense.without_layers([2])
    evaluated: dict[str, dict[str, Artifact]] = {
        "model": {"model": dense},
        "dense": {"evaluation": evaluate(dense, 10.0)},
        "first": {"model": first, "evaluation": evaluate(first, 20.0)},
        "second": {"model": second, "evaluation": evaluate(second, 15.0)},
    }
    assert summarise_outputs(evaluated, []).closed_gaps() == []
    del evaluated["dense"]
    assert summarise_outputs(evaluated, []).closed_gaps() == []


def test_settings_of_one_data_set_are_told_apart(dense: ModelGraph) -> None:
    short = evaluate(dense, 30.0).model_copy(update={"sequence_length": 8})
    outputs: dict[str, dict[str, Artifact]] = {
        "model": {"model": dense},
        "a": {"evaluation": evaluate(dense, 10.0)},
        "b": {"evaluation": short},
    }
    summary = summarise_outputs(outputs, [])
    assert values_of(summary.models[0]) == {"perplexity on text, 4 x 26 tokens": 10.0, "perplexity on text, 4 x 8 tokens": 30.0}


def test_summary_as_people_read_it(summary: Summary) -> None:
    from rich.console import Console

    stream = io.StringIO()
    print_summary(Console(file=stream, width=160), summary, 75.4)
    lines = [re.sub(r"\s+", " ", line).strip() for line in stream.getvalue().splitlines()]
    assert "model layers parameters bytes perplexity on text perplexity on other" in lines
    assert any(line.startswith("pruned 3 ") and line.endswith(" 40.000") for line in lines)
    assert "project_compensate closes 50.0% of the gap in log-perplexity that pruning opened on text." in lines
    assert "prune prune 0.2 s" in lines
    assert "evaluate evaluate from the store" in lines
    assert "all 1 min 15 s" in lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_json_is_one_object_a_line_and_progress_is_thinned(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(reporters.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    reporter = JsonReporter(stream)
    reporter.run_started(RunStarted("r.yaml", ["prune"]))
    for done in range(10):
        reporter.progress(Progress("prune", "work", done, 10, "layer", None, None))
        clock[0] += 0.1
    reporter.note("prune", "removed layers 3")
    reporter.run_finished(RunFinished(1.0, summary))
    reporter.error(4, "broken", "step 'prune'")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["run_started", "progress", "progress", "note", "run_finished", "error"]
    now = datetime.now(timezone.utc)
    assert all(
        timedelta(0) <= now - datetime.strptime(event.pop("time"), "%Y-%m-%dT%H:%M:%S.%f%z") < timedelta(seconds=10)
        for event in events
    )
    assert (events[0]["schema"], events[0]["version"]) == (1, __version__)
    assert events[3] == {"event": "note", "step": "prune", "text": "removed layers 3"}
    assert events[4]["summary"]["models"][1]["metrics"]["perplexity on text"]["value"] == 40.0
    assert events[5] == {"event": "error", "exit_code": 4, "message": "broken", "where": "step 'prune'"}


def test_lines_of_long_work_are_far_between(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(reporters.time, "monotonic", lambda: clock[0])
    reporter = LineReporter()
    for done in range(1, 26):
        clock[0] += 1.0
        reporter.progress(Progress("score", "score layers", done, 100, "layer", 1.0, 100.0 - done))
    reporter.note("score", "found it")
    reporter.step_finished(StepFinished("score", "gradmap_score", False, 25.0, 25.0, {}))
    assert capsys.readouterr().out.splitlines() == [
        "score: score layers 1/100, 1 layer/s, 1 min 39 s left",
        "score: score layers 11/100, 1 layer/s, 1 min 29 s left",
        "score: score layers 21/100, 1 layer/s, 1 min 19 s left",
        "  found it",
        "score: done (25 s)",
    ]


def test_error_says_the_place_once(capsys: pytest.CaptureFixture[str]) -> None:
    QuietReporter().error(2, "r.yaml:1:1: wrong\nr.yaml:2:1: wrong too", "r.yaml:1:1")
    QuietReporter().error(4, "broken", "step 'prune'")
    assert capsys.readouterr().err.splitlines() == [
        "error: r.yaml:1:1: wrong",
        "error: r.yaml:2:1: wrong too",
        "error: step 'prune': broken",
    ]


SLOW_STAGE = '''
import time
from pydantic import BaseModel
from gradmap_pipeline import ModelGraph, Stage, hookimpl

class Wait(Stage):
    """Take two seconds."""
    name = "wait"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        with context.progress("sleep well", 20, "nap") as advance:
            for _ in range(20):
                time.sleep(0.1)
                advance()
        context.note("slept")
        return self.Outputs(model=inputs.model)

@hookimpl
def gradmap_stages():
    return [Wait]
'''


@pytest.mark.full
def test_terminal_shows_a_bar_with_rate_and_time_left(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(SLOW_STAGE)
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: wait\n")
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "gradmap_pipeline", "run", "r.yaml", "--plugin", "wait.py"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = ""
    while select.select([master], [], [], 30)[0]:
        try:
            shown += os.read(master, 4096).decode()
        except OSError:
            break
    assert process.wait() == 0
    os.close(master)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"wait: sleep well .*\d+/20 +[\d.]+ nap/s +0:00:0\d", plain)
    assert "slept" in plain
    assert re.search(r"wait: done \(\d+(\.\d)? s\)", plain)


def test_run_begins_with_what_it_computes_on(capsys: pytest.CaptureFixture[str]) -> None:
    place = Place("docs-llama", "cpu", "float32", 2, 3 << 30, "/elsewhere/store")
    LineReporter().computing(place)
    assert capsys.readouterr().out == "docs-llama on cpu in float32, 2 threads, 3.00 GiB of memory; store /elsewhere/store\n"
    several = Place("\x1b[1mm", "cuda:0", "bfloat16", 1, 1 << 30, "s", processes=8)
    LineReporter().computing(several)
    told = "\\x1b[1mm on cuda:0 in bfloat16, 1 thread, 1.00 GiB of memory each, 8 processes; store s\n"
    assert capsys.readouterr().out == told


def tell_notes(reporter: LineReporter) -> None:
    for layer in range(8):
        reporter.note("fix", f"layer {layer}: better by {layer}")
    for text in ("wrote it", "warning: one", "warning: two", "warning: three", "warning: four"):
        reporter.note("fix", text)


def test_notes_on_one_layer_after_another_are_folded_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineReporter()
    tell_notes(reporter)
    reporter.step_finished(StepFinished("fix", "fix", False, 1.0, 1.0, {}))
    reporter.note("again", "layer 7: better by 7")
    assert capsys.readouterr().out.splitlines() == [
        *(f"  layer {layer}: better by {layer}" for layer in range(3)),
        *("  wrote it", "  warning: one", "  warning: two", "  warning: three", "  warning: four"),
        "  and 5 more of this kind; -v shows them, and gradmap.log in the store has them",
        "fix: done (1.0 s)",
        "  layer 7: better by 7",
    ]
    tell_notes(reporter)
    reporter.error(4, "broken", None)
    assert "  and 6 more of this kind" in capsys.readouterr().out


def test_verbose_prints_every_note(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineReporter(verbose=True)
    tell_notes(reporter)
    reporter.step_finished(StepFinished("fix", "fix", False, 1.0, 1.0, {}))
    assert [line for line in capsys.readouterr().out.splitlines() if "layer" in line] == [
        f"  layer {layer}: better by {layer}" for layer in range(8)
    ]


def test_log_has_every_note_and_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("mine")
    (tmp_path / "gradmap.log").symlink_to(elsewhere)
    for _ in range(2):
        reporter = LoggingReporter(QuietReporter(), tmp_path / "gradmap.log")
        reporter.note("early", "before the run")
        reporter.run_started(RunStarted("r.yaml", ["fix"]))
        reporter.computing(Place("m", "cpu", "float32", 1, 1 << 30, "s"))
        for layer in range(8):
            reporter.note("fix", f"layer {layer}: \x1b[31mred")
        reporter.error(4, "broken", "step 'fix'")
    lines = (tmp_path / "gradmap.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "r.yaml: fix",
        "m on cpu in float32, 1 thread, 1.00 GiB of memory; store s",
        *(f"fix: layer {layer}: \\x1b[31mred" for layer in range(8)),
        "error 4: step 'fix': broken",
    ]
    assert elsewhere.read_text() == "mine"
    assert capsys.readouterr().err.count("error: step 'fix': broken") == 2


def test_log_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "gradmap.log").mkdir()
    reporter = LoggingReporter(QuietReporter(), tmp_path / "gradmap.log")
    reporter.run_started(RunStarted("r.yaml", []))
    reporter.note("fix", "told")
    assert (tmp_path / "gradmap.log").is_dir()


@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (12345.6, "12,346 token/s"),
        (100.0, "100 token/s"),
        (12.34, "12.3 token/s"),
        (1.0, "1 token/s"),
        (0.4, "2.5 s a token"),
        (0.002, "8 min 20 s a token"),
    ],
)
def test_rates(rate: float, shown: str) -> None:
    assert format_rate(rate, "token") == shown


def open_terminal(stream: io.StringIO, width: int, term: str = "xterm") -> Console:
    """A terminal without colours."""
    plain: dict[str, Any] = {"color_system": None, "markup": False, "highlight": False, "_environ": {"TERM": term}}
    return Console(file=stream, width=width, force_terminal=True, **plain)


def summarise_large_models(labels: list[str]) -> Summary:
    """A dense model and others made of it, of 134,515,008 parameters and less, with three metrics."""
    rows = []
    for place, label in enumerate(labels):
        values = {"perplexity on /texts/data/test.txt": 29.61 + place, "repetition": 0.1704, "agreement": 0.3725}
        metrics = {title: Metric(name=title, value=value, better="lower") for title, value in values.items()}
        kept, count = tuple(range(30 - place)), 134_515_008 - place * 3_540_096
        step = "project_compensate" if place else "model"
        rows.append(ModelRow(label, step, len(kept), kept, place, 0, count, 2 * count, metrics))
    return Summary(rows, [StepRow("evaluate_dense", "evaluate", 7.4, False), StepRow("fix", "project_compensate", 134.0, False)])


@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize("width", [80, 140])
def test_summary_cuts_no_number_and_no_name(width: int, count: int) -> None:
    labels = ["dense", "pruned", "compensated", "refit", "distilled", "quantized_to_q4_k_m", "merged"][:count]
    summary = summarise_large_models(labels)
    stream = io.StringIO()
    print_summary(open_terminal(stream, width), summary, 200.0)
    shown = stream.getvalue()
    words = shown.split()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert {"parameters", "repetition", "agreement", "project_compensate", "evaluate_dense", *labels} <= set(words)
    assert {f"{row.parameters:,}" for row in summary.models} | {f"{row.bytes:,}" for row in summary.models} <= set(words)
    assert words.count("0.1704") == words.count("0.3725") == count
    assert ("metric" in words) is (width == 80)
    assert "perplexity on test.txt" in shown


@pytest.mark.parametrize("width", [80, 140])
def test_comparison_cuts_no_number_and_no_name(width: int) -> None:
    models = summarise_large_models(["dense", "compensated"]).models
    rows = [
        Row(f"mine, prune.layers={one.removed}", one.label, one.layers, one.parameters, one.bytes, one.metrics) for one in models
    ]
    stream = io.StringIO()
    print_comparison(Comparison(rows), open_terminal(stream, width))
    shown = stream.getvalue()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert {"134,515,008", "269,030,016", "prune.layers=1", "compensated", "0.1704", "repetition", "evaluations"} <= set(
        shown.split()
    )
    assert shown.count("variant") == (3 if width == 80 else 1)


def test_removed_layers_go_on_below_and_numbers_do_not() -> None:
    stream = io.StringIO()
    headings = ("model", "step", "layers", "parameters", "removed")
    cells = [["compensated", "project_compensate", "22", "106,194,240", "3, 12, 13, 14, 15, 17, 25, 26"]]
    columns, figures = ["perplexity on test.txt"], [["39.45"]]
    print_models(open_terminal(stream, 80), headings, cells, columns, figures, ["project_compensate"])
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    start = lines.index("compensated project_compensate 22 106,194,240 3, 12, 13, 14, 15,")
    assert lines[start + 1] == "17, 25, 26"
    assert "perplexity on test.txt 39.45" in lines


def test_tables_that_go_to_no_terminal_have_no_trailing_blanks(summary: Summary, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(make_console(), summary, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert lines == [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("error: it fits", ["error: it fits"]),
        ("  wrote a model that answers chats", ["  wrote a model that", "    answers chats"]),
        ("error: /a/path/longer/than/the/width is not there", ["error:", "  /a/path/longer/than/the/width", "  is not there"]),
        ("", [""]),
    ],
)
def test_long_lines_go_on_at_words_below(line: str, parts: list[str]) -> None:
    assert wrap_words(line, 20) == parts
    assert wrap_words(line, None) == [line]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_refusals_and_notes_are_whole_where_they_are_wrapped(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "40")
    refused, noted = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", refused)
    message = "found 31 layers, accepted: fewer than the model has, which is 30"
    QuietReporter().error(2, message, "r.yaml:9:3")
    reporter = LineReporter()
    reporter.console = open_terminal(noted, 40, term)
    reporter.note("export", f"a model that answers chats: {message}")
    for stream in (refused, noted):
        lines = stream.getvalue().splitlines()
        assert " ".join(" ".join(lines).split()).endswith(message)
        assert (len(lines) == 1) is (term == "dumb")
        assert term == "dumb" or max(map(len, lines)) <= 40
        assert len({len(line) - len(line.lstrip()) for line in lines[1:]}) <= 1


def test_refusal_in_a_pipe_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    QuietReporter().error(4, "word " * 30, None)
    assert capsys.readouterr().err.count("\n") == 1


def test_plan_loses_nothing_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    for module in (plan_table, cost_table):
        monkeypatch.setattr(module, "make_console", lambda: open_terminal(stream, 80))
    plan = make_plan(load_recipe(Path(__file__).parent.parent / "recipes" / "quickstart.yaml"), load_catalog())
    plan_table.print_plan(plan)
    lines = {"layer weights": 3 << 30, "hidden states": 2 << 30}
    estimate = Estimate(5 << 30, 10**9, 10**6, flops=1e15, seconds=3000.0, how="layers stay in memory, graphs kept", lines=lines)
    steps = [StepCost(step.id, 10**9, estimate) for step in plan.steps]
    cost_table.print_costs(PlanCosts(8 << 30, [*steps, StepCost("large", None, None, "too large")]))
    shown = stream.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    joined = " ".join(shown.split())
    assert 'dataset: {"builtin": "heldout"}, samples: 128, sequence_length: 256, max_perplexity_ratio: 1.8' in joined
    assert "evaluate_pruned (evaluate) takes prune" in joined
    assert "project_compensate takes prune, calibrate: 9 layers" in joined
    assert "project_compensate 5.00 GiB 1.0 GB 1.0 MB 1.0e+15 50 min 00 s" in joined
    assert "does not fit" in joined
    assert joined.count("graphs kept") == len(plan.steps)


def test_titles_lose_folders_where_none_is_mistaken_for_another() -> None:
    assert shorten_titles(["perplexity on /data/test.txt", "loss", "perplexity on builtin heldout"]) == [
        "perplexity on test.txt",
        "loss",
        "perplexity on builtin heldout",
    ]
    alike = ["perplexity on /a/test.txt", "perplexity on /b/test.txt"]
    assert shorten_titles(alike) == alike
