"""`gradmap suggest`: the curve against runs of recipes and against sizes of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_model
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.run.size_curve import choose_counts, name_model

pytestmark = pytest.mark.full


@pytest.fixture
def folder(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with a model of six layers and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    make_model(tmp_path / "model", num_hidden_layers=6)
    return tmp_path


def suggest(*arguments: str) -> Result:
    texts = ("--text", "text.txt", "--held-out", "text.txt")
    return CliRunner().invoke(app, ["suggest", "model", *texts, "--samples", "4", "--length", "32", *arguments])


def test_the_curve_is_what_a_recipe_gives(folder: Path) -> None:
    result = suggest("--share", "0.5", "--json")
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)
    assert [point["layers"] for point in points] == [6, 5, 4, 3]
    assert points[0]["perplexity_ratio"] == 1
    assert points[0]["speedup"] == 1 < points[1]["speedup"] < points[3]["speedup"] < 2
    data = {"dataset": {"path": "text.txt"}, "samples": 4, "sequence_length": 32}
    steps = [
        {"use": "calibrate", "with": data},
        {"use": "gradmap_score"},
        {"use": "prune", "with": {"layers": 2}},
        {"use": "evaluate", "with": data},
        {"use": "export", "with": {"to": "out"}},
    ]
    (folder / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    ran = CliRunner().invoke(app, ["run", "r.yaml", "--store", "other", "--json"])
    assert ran.exit_code == 0, ran.output
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    (evaluated,) = [event["outputs"]["evaluation"] for event in events if event.get("step") == "evaluate" and "outputs" in event]
    assert points[2]["perplexity"] == pytest.approx(evaluated["perplexity"], rel=1e-9)
    assert (points[2]["parameters"], points[2]["bytes"]) == (evaluated["parameters"], evaluated["bytes"])
    lineage = json.loads((folder / "out/gradmap.json").read_text())
    assert points[2]["removed"] == lineage["layers_removed"]


def test_the_table_names_what_a_recipe_says(folder: Path) -> None:
    result = suggest("--points", "1")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "layers parameters bytes speed perplexity ratio removed" in said
    assert "`prune: {target: {parameters: " in said
    assert "model layers parameters" not in said  # the tables of a run are not there
    again = suggest("--points", "1")
    assert "gradmap_score: done (from the store)" in again.stdout


def test_depths_are_spread_evenly() -> None:
    assert choose_counts(3, 8) == [1, 2, 3]
    assert choose_counts(15, 8) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert choose_counts(15, 1) == [1]
    assert choose_counts(40, 2) == [1, 40]


def test_a_model_is_named_as_in_a_recipe(folder: Path) -> None:
    named = [name_model(given) for given in ("model", "owner/name", "builtin:docs-llama", "./owner/name")]
    assert named == [{"path": "model"}, {"id": "owner/name"}, {"builtin": "docs-llama"}, {"path": "./owner/name"}]


def test_wrong_arguments(folder: Path) -> None:
    for arguments, message in (
        (("builtin:other",), "MODEL: found 'other', accepted: docs-llama"),
        (("nowhere",), "no folder 'nowhere'"),
        (("model", "--ranking", "gradmap_scor"), "did you mean 'gradmap_score'"),
        (("model", "--ranking", "prune"), "--ranking: stage 'prune' ranks no layers; name one that does, such as gradmap_score"),
        (
            ("model", "--ranking", "angular_score"),
            "'angular_score' chooses layers that go together, and a curve takes them one by one",
        ),
        (("model", "--share", "2"), "less than or equal to 0.9"),
        (("model", "--text", "none.txt"), "none.txt"),
    ):
        result = CliRunner().invoke(app, ["suggest", *arguments])
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
