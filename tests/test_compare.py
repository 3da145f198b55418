"""gradmap compare: variants, shared work, the table, the files, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny import make_model, make_text
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.machine import extras

pytestmark = pytest.mark.full

HELDOUT = {"dataset": {"path": "text.txt"}, "samples": 4, "sequence_length": 32}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and two recipes that differ in how layers are scored."""
    make_model(tmp_path / "model")
    make_text(tmp_path / "text.txt")
    for name, stage in (("one", "gradmap_score"), ("other", "sleb_score")):
        steps: list[dict[str, Any]] = [
            {"use": "evaluate", "id": "evaluate_dense", "with": HELDOUT},
            {"use": "calibrate", "with": HELDOUT},
            {"use": stage, "id": "score", "with": {"layers": 2}},
            {"use": "prune", "with": {"layers": 1}},
            {"use": "project_compensate"},
            {"use": "evaluate", "with": HELDOUT},
            {"use": "export", "with": {"to": "out/model"}},
            {"use": "evaluate", "id": "evaluate_export", "from": {"model": "export.exported"}, "with": HELDOUT},
        ]
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compare", *arguments])
    return result.exit_code, result.output


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "out/comparison/comparison.csv").open() as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_two_recipes_in_one_table(folder: Path) -> None:
    code, output = compare("one.yaml", "other.yaml")
    assert code == 0, output
    assert "left out, as variants would write over each other: evaluate_export, export" in output
    assert output.count("calibrate: done") == 1  # the second recipe takes it from the store
    assert not (folder / "out/model").exists()
    rows = rows_of(folder)
    assert list(rows) == ["model", "one", "other"]
    assert [row["model"] for row in rows.values()] == ["dense", "compensated", "compensated"]
    assert [row["layers"] for row in rows.values()] == ["4", "3", "3"]
    dense, one, other = (float(row["perplexity on text.txt"]) for row in rows.values())
    assert dense != one
    assert abs(one - other) < one
    # half of the samples through 4 layers and back to the lowest, then what the first removal leaves; SLEB needs more
    assert 0 < float(rows["one"]["layer evaluations"]) < float(rows["other"]["layer evaluations"])
    table = (folder / "out/comparison/comparison.md").read_text().splitlines()
    assert len(table) == 5
    assert table[0].startswith("| variant | model | layers |")
    assert ElementTree.parse(folder / "out/comparison/comparison.svg").getroot().tag.endswith("svg")
    page = (folder / "out/comparison/comparison.html").read_text()
    assert "<h1>Comparison of 3 models</h1>" in page
    assert all(f"<td>{name}</td>" in page for name in rows)


def test_how_texts_are_packed_is_part_of_a_column(folder: Path) -> None:
    """Perplexities of texts end to end and of one text a sequence stand in two columns, as those of two lengths do."""
    assert compare("one.yaml", "--grid", "evaluate.packing=documents,none", "--set", "evaluate.samples=1")[0] == 0
    (packed, alone) = list(rows_of(folder).values())[-2:]
    columns = ("perplexity on text.txt, 1 x 32 tokens", "perplexity on text.txt, 1 x 32 tokens, packing none")
    assert [bool(row[column]) for row in (packed, alone) for column in columns] == [True, False, False, True]


def test_seconds_are_those_of_the_computation(folder: Path) -> None:
    """A second run takes everything from the store, and tells the same."""
    assert compare("one.yaml")[0] == 0
    first = rows_of(folder)
    code, output = compare("one.yaml")
    assert code == 0
    assert "done (" not in output
    assert rows_of(folder) == first
    assert float(first["one"]["seconds"]) > 0


def test_a_grid_of_one_recipe(folder: Path) -> None:
    code, output = compare("one.yaml", "--grid", "prune.layers=1,[2]", "--grid", "project_compensate.ridge=0.1,1.0")
    assert code == 0, output
    assert list(rows_of(folder))[1:] == [
        "layers 1, ridge 0.1",
        "layers 1, ridge 1.0",
        "layers [2], ridge 0.1",
        "layers [2], ridge 1.0",
    ]
    assert output.count("score: done") == 1


def test_options_that_change_together(folder: Path) -> None:
    code, output = compare("one.yaml", "--grid", "score.layers,prune.layers=1,2")
    assert code == 0, output
    rows = rows_of(folder)
    assert [rows[name]["layers"] for name in ("layers 1", "layers 2")] == ["3", "2"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("prune.layers", "--grid prune.layers: must look like STEP.OPTION=A,B,C, for example prune.ratio=0.1,0.25"),
        ("layers=1,2", "--grid layers=1,2: must look like STEP.OPTION=A,B,C"),
        ("pruning.layers=1,2", "--set pruning.layers=1: no step 'pruning' in this recipe; did you mean 'prune'?"),
        ("prune.layers=1,9", "step 'prune': option 'layers': removes 9 of 4 layers, but only 2 are not protected; lower 'layers'"),
    ],
)
def test_wrong_grids_before_anything_runs(grid: str, message: str, folder: Path) -> None:
    code, output = compare("one.yaml", "--grid", grid)
    assert code == 2
    assert message in output
    assert not (folder / ".gradmap").exists()


def test_a_variant_that_fails_does_not_stop_the_others(folder: Path) -> None:
    code, output = compare("one.yaml", "--grid", "evaluate.max_perplexity=1.5,100000")
    assert code == 5
    assert "error: step 'evaluate': max_perplexity 1.5: perplexity" in output
    assert list(rows_of(folder)) == ["model", "max_perplexity 100000"]


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    code, output = compare("one.yaml")
    assert code == 0
    assert "no plot: " in output
    assert "pip install 'gradmap-pipeline[plot]'" in output
    assert not (folder / "out/comparison/comparison.svg").exists()


def test_one_text_cut_in_two_ways_is_two_columns(folder: Path) -> None:
    code, output = compare("one.yaml", "--grid", "evaluate.samples=2,3")
    assert code == 0, output
    with (folder / "out/comparison/comparison.csv").open() as file:
        headings = next(csv.reader(file))
    assert "perplexity on text.txt, 2 x 32 tokens" in headings
    assert "perplexity on text.txt, 3 x 32 tokens" in headings


def test_recipes_of_one_name_and_one_that_measures_nothing(folder: Path) -> None:
    (folder / "more").mkdir()
    recipe = json.loads((folder / "one.yaml").read_text())
    del recipe["steps"][5]
    (folder / "more/one.yaml").write_text(json.dumps(recipe))
    code, output = compare("one.yaml", "more/one.yaml", "--grid", "project_compensate.ridge=0.1,0.2")
    assert code == 4
    assert list(rows_of(folder)) == ["model", "one.yaml: ridge 0.1", "one.yaml: ridge 0.2"]
    for ridge in ("0.1", "0.2"):
        assert f"error: more/one.yaml: ridge {ridge}: evaluates no model that it makes, besides those left out" in output


def test_a_comparison_takes_the_place_of_an_earlier_one(folder: Path) -> None:
    assert compare("one.yaml", "other.yaml")[0] == 0
    assert compare("one.yaml")[0] == 0
    assert list(rows_of(folder)) == ["model", "one"]
    result = CliRunner().invoke(app, ["verify", "out/comparison"])
    assert result.exit_code == 0, result.output
    assert "it holds no model" in result.output


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("model", "--out 'model' is the model"),
        ("model/sub", "--out 'model/sub' lies in the model"),
        ("kept/sub", "--out 'kept/sub' lies in the store"),
        (".", "--out '.' holds the store"),
        ("t.txt", "'t.txt' is not a folder; name a folder"),
        ("t.txt/x", "t.txt' is not a folder; name a folder"),
        ("/proc/x", "--out: '/proc/x' cannot be made: '/proc' is not a folder that can be written to"),
        ("mine", "--out 'mine' holds 'comparison.csv', which is not part of a comparison; choose another folder, or move"),
    ],
)
def test_a_place_for_the_table_is_checked_before_anything_runs(out: str, message: str, folder: Path) -> None:
    (folder / "t.txt").write_text("mine")
    (folder / "mine").mkdir()
    (folder / "mine/comparison.csv").write_text("mine")
    before = sorted(folder.rglob("*"))
    code, output = compare("one.yaml", "--out", out, "--store", "kept")
    assert code == 2, output
    assert message in output.replace("\n", " ")
    assert sorted(folder.rglob("*")) == before


def test_an_edited_comparison_is_kept(folder: Path) -> None:
    assert compare("one.yaml")[0] == 0
    file = folder / "out/comparison/comparison.csv"
    file.write_text(file.read_text() + "mine\n")
    code, output = compare("one.yaml", "other.yaml")
    assert code == 2
    assert "holds 'comparison.csv', which has been changed since it was exported" in output
    assert file.read_text().endswith("mine\n")
