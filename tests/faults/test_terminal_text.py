"""Names, options and messages reach the terminal as text: no escape sequence, no markup, no line of theirs."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.metrics import Metric
from gradmap_pipeline.report.comparison_files import print_comparison, save_comparison
from gradmap_pipeline.report.reporters import CompareReporter, LineReporter, QuietReporter
from gradmap_pipeline.report.summary_tables import print_summary
from gradmap_pipeline.run.comparison import Comparison, Row
from gradmap_pipeline.run.summary import ModelRow, StepRow, Summary
from gradmap_pipeline.text import dump_json, show, show_lines

NASTY = "a\x1b[31m[/x] [bold]:smile:\x07\r\n\u202eb\u2066\x9b\udc80\x7f"
SHOWN = r"a\x1b[31m[/x] [bold]:smile:\x07\r\n\u202eb\u2066\x9b\udc80\x7f"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (NASTY, SHOWN),
        ("plain text", "plain text"),
        ("ö 漢字 👩\u200d💻", "ö 漢字 👩\u200d💻"),
        ("\t\0", r"\t\x00"),
        ("\u2028\u2029\u200f\u061c", r"\u2028\u2029\u200f\u061c"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert show(text) == shown


def test_only_meant_line_breaks_are_kept() -> None:
    assert show_lines("a\nb\x1b\r") == "a\nb\\x1b\\r"


def is_clean(text: str) -> bool:
    return all(character == "\n" or character.isprintable() for character in text)


def measure(column: str, value: float) -> dict[str, Metric]:
    """The metrics of a row, by their column."""
    return {column: Metric(name="perplexity", on=column, value=value, better="lower")}


def test_every_table_and_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = ModelRow(NASTY, NASTY, 1, (0,), 0, 0, 1, 1, measure(NASTY, 1.0))
    pruned = ModelRow("p", "p", 1, (0,), 1, 0, 1, 1, measure(NASTY, 3.0))
    corrected = ModelRow("c", NASTY, 1, (0,), 1, 1, 1, 1, measure(NASTY, 2.0))
    stream = io.StringIO()
    print_summary(Console(file=stream, width=400), Summary([row, pruned, corrected], [StepRow(NASTY, NASTY, 1.0, False)]), 1.0)
    comparison = Comparison([Row(NASTY, NASTY, 1, 1, 1, measure(NASTY, 1.0))])
    print_comparison(comparison, Console(file=stream, width=400))
    assert stream.getvalue().count(SHOWN) == 9
    assert is_clean(stream.getvalue())
    LineReporter().note("step", NASTY)
    CompareReporter([NASTY]).run_started(None)  # type: ignore[arg-type]
    QuietReporter().error(2, f"{NASTY} is wrong\nsecond", NASTY)
    said = capsys.readouterr()
    assert said.out == f"  {SHOWN}\n1/1 {SHOWN}\n"
    assert is_clean(said.err)
    assert all(line.startswith("error: ") for line in said.err.splitlines())


def test_comparison_files_and_plot(tmp_path: Path) -> None:
    names = ["a|b\nc", "$x", "$\\frac$", "_hidden", "[/x]"]
    comparison = Comparison([Row(name, name, 1, 1, 1, measure("$y$ ^", 1.0 + place), 1.0) for place, name in enumerate(names)])
    list(save_comparison(comparison, tmp_path))
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert len(lines) == 2 + len(names)
    assert lines[2].startswith(r"| a\|b\nc | a\|b\nc |")
    svg = tmp_path / "comparison.svg"
    assert svg.is_file()


def test_json_is_json(tmp_path: Path) -> None:
    text = dump_json({"a": [float("nan"), float("inf"), 1.5], "b": {"c": (-float("inf"), NASTY)}, "p": tmp_path})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, None, 1.5],
        "b": {"c": [None, NASTY]},
        "p": str(tmp_path),
    }
    assert text.isascii()


RECIPE = {
    "version": 1,
    "steps": [
        {"use": "calibrate", "id": "calibrate_it", "with": {"samples": 2, "sequence_length": 16}},
        {"use": "prune", "with": {"layers": [1]}},
        {"use": "evaluate", "with": {"samples": 2, "sequence_length": 16}},
    ],
}


@pytest.fixture
def nasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path) -> Path:
    """A recipe whose model, data set, steps and file have names that a terminal would obey or rich would read."""
    monkeypatch.chdir(tmp_path)
    name = "[x]\x1b[31m:smile:"
    shutil.copytree(llama, tmp_path / name)
    (tmp_path / "x\x1b\u202e:smile:.txt").write_text(text.read_text())
    recipe = json.loads(json.dumps(RECIPE))
    recipe["model"] = {"path": name}
    for step in (recipe["steps"][0], recipe["steps"][2]):
        step["with"]["dataset"] = {"path": "x\x1b\u202e:smile:.txt"}
    (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
    return Path(f"{name}.yaml")


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_whole_commands(nasty: Path) -> None:
    for command in ("check", "plan", "run", "compare"):
        result = gradmap(command, str(nasty))
        assert result.exit_code == 0, result.stderr
        assert is_clean(result.output), command
        if command != "run":
            assert r"[x]\x1b[31m:smile:" in result.stdout, command
    events = [json.loads(line, parse_constant=pytest.fail) for line in gradmap("run", str(nasty), "--json").stdout.splitlines()]
    assert events[0]["recipe"].endswith(str(nasty)), "programs get names as they are"
    wrong = gradmap("run", str(nasty), "--set", "prune.layers=\x1b[2J[/x]")
    assert wrong.exit_code == 2
    assert is_clean(wrong.stderr)
    assert r"\x1b[2J" in wrong.stderr
    for line in (["verify", "\x1b[2J"], ["stages", "\x1b[2J"], ["check", "\x1b[2J"], ["check", str(nasty), "--plugin", "\x1b[/]"]):
        result = gradmap(*line)
        assert result.exit_code in (2, 4)
        assert is_clean(result.stderr), line
