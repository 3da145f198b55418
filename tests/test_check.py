"""`gradmap check`: several recipes at once, and what it says as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app

GOOD = "version: 1\nmodel: {builtin: docs-llama}\nsteps:\n  - use: export\n    with: {to: out}\n"
BAD = "version: 1\nmodel: {builtin: docs-llama}\nsteps:\n  - use: exprot\n  - use: prune\n    with: {ratoi: 0.2}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(GOOD)
    Path("bad.yaml").write_text(BAD)
    return tmp_path


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


def test_a_recipe_with_problems_does_not_hide_the_next() -> None:
    result = check("bad.yaml", "good.yaml", "none.yaml")
    assert result.exit_code == 2
    assert result.stdout == "good.yaml: no problems in 1 step\n"
    first, second, third = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert first == "error: bad.yaml:4:5: no stage named 'exprot'; did you mean 'export'?"
    assert second.startswith("error: bad.yaml:6:12: step 'prune': option 'ratoi': unknown key 'ratoi'")
    assert third.startswith("error: none.yaml: cannot be read: No such file or directory")


def test_several_good_recipes_end_with_zero() -> None:
    assert check("good.yaml", "good.yaml").exit_code == 0


def test_json_gives_every_problem_with_its_place() -> None:
    result = check("bad.yaml", "good.yaml", "none.yaml", "--json")
    assert result.exit_code == 2
    assert "error: " not in result.stderr
    told = json.loads(result.stdout)
    assert told["schema"] == 1
    bad, good, none = told["recipes"]
    assert good == {"recipe": "good.yaml", "steps": ["export"], "problems": [], "exit_code": 0, "advice": []}
    assert [(one["file"], one["line"], one["column"]) for one in bad["problems"]] == [("bad.yaml", 4, 5), ("bad.yaml", 6, 12)]
    assert bad["problems"][0]["message"] == "no stage named 'exprot'; did you mean 'export'?"
    assert set(none["problems"][0]) == {"where", "message"}
    assert [one["exit_code"] for one in (bad, good, none)] == [2, 0, 2]


def test_an_option_is_replaced_in_one_recipe_alone() -> None:
    assert check("good.yaml", "--set", "export.to=elsewhere").exit_code == 0
    result = check("good.yaml", "bad.yaml", "--set", "export.to=elsewhere")
    assert result.exit_code == 2
    assert result.stderr == "error: --set is for one recipe, and 2 are named; check them one by one\n"
