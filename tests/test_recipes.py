"""The recipes that ship: each says what it does, can be planned without a network, and names stages that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.plan import make_plan
from gradmap_pipeline.recipe.recipe import load_recipe
from gradmap_pipeline.recipe.schema import make_schema

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_is_planned_offline(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = make_plan(load_recipe(file), load_catalog())
    assert "export" in [step.stage.name for step in plan.steps]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_starts_with_what_needs_and_command(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3])
    assert lines[1].startswith("# Needs ")
    assert lines[2].startswith(f"# gradmap run recipes/{file.name}")
    assert lines[3] == "version: 1"


LEFT = {"draft": 6, "recover-and-quantise": 8}
"""Layers that are left at the end, where not nine."""
RUN = [
    pytest.param(file, marks=[pytest.mark.slow] if file.stem == "recover-and-quantise" else [])
    for file in RECIPES
    if "builtin" in file.read_text() and file.stem != "prune-quantize-onnx"  # which docs/recipes.md and test_chains.py run
]


@pytest.mark.full
@pytest.mark.parametrize("file", RUN, ids=lambda file: file.stem)
def test_recipe_of_the_builtin_model_runs(file: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it ships, on fewer samples; what comes out is a folder that verifies."""
    monkeypatch.chdir(tmp_path)
    steps = [step.id for step in load_recipe(file).steps]
    smaller = [f"--set={step}.samples=24" for step in steps if step.startswith(("evaluate", "calibrate"))]
    smaller += ["--set=refit_layers.steps=20"] if "refit_layers" in steps else []
    smaller += ["--set=distill.steps=10", "--set=distill.samples=32"] if "distill" in steps else []
    result = CliRunner().invoke(app, ["run", str(file), "--store", str(store), "--json", *smaller])
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    models = events[-1]["summary"]["models"]
    assert [models[0]["layers"], models[-1]["layers"]] == [12, LEFT.get(file.stem, 9)]
    verified = CliRunner().invoke(app, ["verify", str(next((tmp_path / "out").iterdir()))])
    assert verified.exit_code == 0, verified.output


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all recipes, which share their first steps."""
    return tmp_path_factory.mktemp("store")


def test_there_is_one_for_each_promised_model() -> None:
    assert {file.stem for file in RECIPES} >= {"quickstart", "llama-2-7b", "llama-3.1-8b", "qwen3-8b", "mistral-7b"}
    published = {"sleb", "shortgpt", "angular", "taylor", "perplexity", "magnitude", "mka", "replaceme", "linearpatch", "prunecomp"}
    assert {file.stem for file in RECIPES} >= {*published, "gradmap-paper"}


def test_hub_model_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    result = CliRunner().invoke(app, ["run", str(ROOT / "recipes/qwen3-8b.yaml"), "--store", str(tmp_path / "store")])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "cannot get model 'Qwen/Qwen3-8B' from the Hugging Face hub" in line
    assert "download it elsewhere and use `model: {path: FOLDER}`" in line


def test_schema_knows_every_stage_and_option() -> None:
    catalog = load_catalog()
    result = CliRunner().invoke(app, ["schema"])
    schema = json.loads(result.stdout)
    assert schema == make_schema(catalog)
    step = schema["properties"]["steps"]["items"]
    use = step["properties"]["use"]
    assert use["enum"] == sorted(catalog.stages)
    assert all(use["enumDescriptions"])
    assert len(use["enumDescriptions"]) == len(use["enum"])
    conditions = {one["if"]["properties"]["use"]["pattern"]: one["then"] for one in step["allOf"]}
    assert len(conditions) == len(catalog.stages)
    for name, stage in catalog.stages.items():
        then = conditions[f"^({name})$"]
        assert then["properties"]["with"] == {"$ref": f"#/$defs/options-of-{name}"}
        options = schema["$defs"][f"options-of-{name}"]
        assert ("required" in then) == any(field.is_required() for field in stage.model_fields.values())
        assert options["properties"].keys() == stage.model_fields.keys()
        assert options["additionalProperties"] is False
    for reference in json.dumps(schema).split('"$ref": "#/$defs/')[1:]:
        assert reference.split('"')[0] in schema["$defs"]
        assert " " not in reference.split('"')[0]


SHARED = """\
version: 1
description: What it is for.
x-text: &text {dataset: {builtin: heldout}, samples: 16, sequence_length: 64}
x-more: {limits: &limits {perplexity: {max: 60}}, any: [1, {thing: true}]}
model: {builtin: docs-llama}
steps:
  - use: prune
    with: {layers: [3]}
  - use: evaluate
    with: {<<: *text, samples: 8}
    limits: *limits
"""


def test_blocks_are_shared(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SHARED)
    plan = make_plan(load_recipe(tmp_path / "r.yaml"), load_catalog())
    options = plan.steps[1].stage.model_dump()
    assert plan.description == "What it is for."
    assert (options["samples"], options["sequence_length"], options["dataset"]["builtin"]) == (8, 64, "heldout")
    assert plan.steps[1].limits["perplexity"].max == 60


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("x-text", "xtext", ":3:1: unknown key 'xtext'"),
        ("x-more", "X-more", ":4:1: unknown key 'X-more'"),
        ("description", "descripton", ":2:1: unknown key 'descripton'; did you mean 'description'?"),
        ("What it is for.", "[1]", ":2:1: description: found [1], accepted: text"),
        ("version: 1\n", "version: 1\nremarks: none\n", "; a block to share has a name that begins with 'x-'"),
        ("  - use: prune\n", "  - use: prune\n    x-mine: 1\n", ":8:5: unknown key 'x-mine'"),
    ],
)
def test_other_keys_stay_refused(old: str, new: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SHARED.replace(old, new, 1))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml")])
    assert result.exit_code == 2
    assert told in result.stderr


def test_schema_knows_shared_blocks() -> None:
    schema = make_schema(load_catalog())
    assert list(schema["patternProperties"]) == ["^x-"]
    assert "description" in schema["properties"]
    assert schema["additionalProperties"] is False
