"""What saves typing: a model as one text, and what the shell offers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline import ModelSource
from gradmap_pipeline.cli import app
from gradmap_pipeline.cli.completion import complete_recipe_file, complete_shipped_recipe, complete_stage
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.recipe import load_recipe, read_recipe
from gradmap_pipeline.recipe.schema import make_schema

STEPS = "steps:\n  - {use: prune, with: {layers: [1]}}\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(model: str, *overrides: str, folder: str = ".") -> Result:
    file = Path(folder) / "r.yaml"
    file.write_text(f"version: 1\nmodel: {model}\n{STEPS}")
    settings = [part for override in overrides for part in ("--set", override)]
    return CliRunner().invoke(app, ["check", str(file), *settings])


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("Qwen/Qwen3-8B", {"id": "Qwen/Qwen3-8B"}),
        ("builtin:docs-llama", {"builtin": "docs-llama"}),
        ("./a/b", {"path": "./a/b"}),
        ("../a", {"path": "../a"}),
        ("/a/b", {"path": "/a/b"}),
        ("~/a", {"path": str(Path("~/a").expanduser())}),
    ],
)
def test_a_text_stands_for_a_mapping(short: str, whole: dict[str, str], place: Path) -> None:
    recipe = read_recipe(f"version: 1\nmodel: {json.dumps(short)}\n{STEPS}", Path("r.yaml"))
    assert recipe.problems == ()
    assert recipe.model == ModelSource.model_validate(whole) == ModelSource.model_validate(short)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("docs-llama", "found 'docs-llama', accepted: owner/name of a hub, a path that starts with './', '/' or '~', builtin:"),
        ("docs-llama", "; write builtin:docs-llama"),
        ("gpt2", "; write {id: gpt2}"),
        ("own", "; write './own'"),
        ("builtin:none", "found 'none', accepted: docs-llama"),
        (
            "own/name",
            "found 'own/name', which is a folder in the current folder, and may be a model on the hub; write './own/name'",
        ),
        ("own/name", "write './own/name' or {id: own/name}"),
        ("./own/name", "'own/name' is not a model folder: it has no config.json"),
        ("a b/c", "found 'a b/c', accepted: owner/name"),
        ("''", "found '', accepted: owner/name"),
        ("3", "found 3, accepted: owner/name of a hub"),
    ],
)
def test_what_is_not_plain_is_told(model: str, message: str, place: Path) -> None:
    (place / "own" / "name").mkdir(parents=True)
    checked = check(model)
    assert checked.exit_code == 2
    assert checked.output.startswith("error: r.yaml:2:1: ")
    assert message in checked.output


def test_a_folder_beside_the_recipe_is_told(place: Path) -> None:
    (place / "recipes" / "own" / "name").mkdir(parents=True)
    checked = check("own/name", folder="recipes")
    assert checked.exit_code == 2
    assert (
        "recipes/r.yaml:2:1: model: found 'own/name', which is a folder beside 'recipes/r.yaml', and may be a model on the hub; "
        "write './recipes/own/name' or {id: own/name}" in checked.output
    )
    assert check("{id: own/name}", folder="recipes").exit_code == 0


def test_parts_of_a_short_form_can_be_set(place: Path) -> None:
    file = place / "r.yaml"
    file.write_text(f"version: 1\nmodel: some/model\n{STEPS}")
    assert load_recipe(file, ["model.dtype=float16"]).model == ModelSource(id="some/model", dtype="float16")
    assert load_recipe(file, ["model=builtin:docs-llama"]).model == ModelSource(builtin="docs-llama")
    assert "give exactly one of 'path', 'id' and 'builtin'" in check("some/model", "model.builtin=docs-llama").output


def test_the_schema_knows_both_forms() -> None:
    schema = make_schema(load_catalog())
    assert schema["properties"]["model"]["$ref"] == "#/$defs/ModelSource"
    text, mapping = schema["$defs"]["ModelSource"]["anyOf"]
    assert text["type"] == "string"
    assert "owner/name" in text["description"]
    assert mapping["type"] == "object"
    assert mapping["additionalProperties"] is False
    assert set(mapping["properties"]) == {"path", "id", "builtin", "revision", "dtype"}


def test_the_shell_offers_commands_stages_and_recipes(place: Path) -> None:
    assert {"gradmap_score", "benchmark"} <= set(complete_stage(""))
    assert complete_stage("benchm") == ["benchmark"]
    assert set(complete_stage("")) <= set(load_catalog().stages) | set(load_catalog().broken)
    assert complete_shipped_recipe("quick") == ["quickstart"]
    (place / "recipes").mkdir()
    for name in ("one.yaml", "two.yml", "recipes/three.yaml", "recipes/text.txt", ".hidden.yaml"):
        (place / name).touch()
    assert complete_recipe_file("") == ["one.yaml", "recipes/", "two.yml"]
    assert complete_recipe_file("recipes/t") == ["recipes/three.yaml"]
    assert complete_recipe_file(f"{place}/o") == [f"{place}/one.yaml"]
    assert complete_recipe_file("nowhere/x") == []


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gradmap store g", "gc"),
        ("gradmap stages benchm", "benchmark"),
        ("gradmap run one", "one.yaml"),
        ("gradmap run --de", "--device"),
    ],
)
def test_bash_is_answered(line: str, offered: str, place: Path) -> None:
    (place / "one.yaml").touch()
    environment = {"_GRADMAP_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = CliRunner().invoke(app, [], env=environment, prog_name="gradmap")
    assert done.output.split() == [offered]


def test_completion_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys, gradmap_pipeline.cli.completion as c; c.complete_stage(''); c.complete_shipped_recipe(''); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gradmap_pipeline.cli.completion" in loaded
    assert not {"torch", "transformers", "pydantic", "yaml"} & set(loaded)
    assert not re.search(r"gradmap_plugins\.", " ".join(loaded))
