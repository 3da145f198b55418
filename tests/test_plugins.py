"""Plugins: installed by strangers, in single files, broken, and what the catalog refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import PluginError
from gradmap_pipeline.recipe.catalog import Catalog, load_catalog

THIRD_PARTY = Path(__file__).parent / "third_party" / "gradmap-top-layers"
RECIPE = "version: 1\nmodel: {path: MODEL}\nsteps:\n  - use: top_layers_score\n  - use: prune\n    with: {layers: 2}\n"
STAGE = '''
from pydantic import BaseModel, Field
from gradmap_pipeline import ModelGraph, Stage, hookimpl

class Nothing(Stage):
    """Do nothing."""
    name = "do_nothing"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        return self.Outputs(model=inputs.model)

@hookimpl
def gradmap_stages():
    return [Nothing]
'''


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(llama)))
    return tmp_path / "r.yaml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the third-party distribution is installed, and a broken one too."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "gradmap-top-layers"
    shutil.copytree(THIRD_PARTY, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    (target / "broken_plugin.py").write_text("import a_module_that_nobody_has\n")
    information = target / "broken_plugin-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[gradmap]\nbroken = broken_plugin\n")
    return {**os.environ, "PYTHONPATH": str(target)}


def run_gradmap(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradmap_pipeline", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def kept_layers(output: str) -> list[int]:
    events = [json.loads(line) for line in output.splitlines()]
    (layers,) = [event["outputs"]["model"]["layers"] for event in events if event.get("step") == "prune" and "outputs" in event]
    return list(layers)


@pytest.mark.full
def test_installed_plugin_runs_in_a_recipe(recipe: Path, installed: dict[str, str]) -> None:
    done = run_gradmap(installed, "run", str(recipe), "--json")
    assert done.returncode == 0, done.stdout
    assert kept_layers(done.stdout) == [0, 3]


def test_same_file_without_packaging(recipe: Path) -> None:
    file = THIRD_PARTY / "gradmap_top_layers.py"
    result = CliRunner().invoke(app, ["run", str(recipe), "--json", "--plugin", str(file)])
    assert result.exit_code == 0, result.stdout
    assert kept_layers(result.stdout) == [0, 3]


def test_metric_of_a_plugin_is_shown_wherever_metrics_are(recipe: Path) -> None:
    """In the table of a run, its JSON, a comparison and the model card."""
    steps = "  - use: measure_depth\n    limits: {depth: {max: 2, max_ratio: 0.5}}\n  - use: export\n    with: {to: exported}\n"
    recipe.write_text(recipe.read_text() + steps)
    plugin = ["--plugin", str(THIRD_PARTY / "gradmap_top_layers.py")]
    result = CliRunner().invoke(app, ["run", str(recipe), *plugin])
    assert result.exit_code == 0, result.output
    assert re.search(r"bytes +depth \(layers\)", result.stdout)
    assert re.search(r"dense .* 4\.000 ± 0\.25 *\n +pruned .* 2\.000 ± 0\.25 *\n", result.stdout)
    assert "| depth |  | 4.000 ± 0.25 layers | 2.000 ± 0.25 layers | lower |" in Path("exported/README.md").read_text()
    (kept,) = json.loads(Path("exported/gradmap.json").read_text())["metrics"]
    assert (kept["name"], kept["value"], kept["stderr"]) == ("depth", 2.0, 0.25)

    result = CliRunner().invoke(app, ["run", str(recipe), *plugin, "--json"])
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert told[-1]["summary"]["models"][-1]["metrics"]["depth (layers)"]["value"] == 2.0
    (step,) = [event for event in told if event["event"] == "step_finished" and event["step"] == "measure_depth"]
    assert [(metric["name"], metric["value"], metric["unit"]) for metric in step["metrics"]] == [("depth", 2.0, "layers")]
    assert [(limit["bound"], limit["value"], limit["missed_by"]) for limit in step["limits"]] == [
        ("max", 2.0, None),
        ("max_ratio", 0.5, None),
    ]

    result = CliRunner().invoke(app, ["compare", str(recipe), *plugin, "--grid", "prune.layers=1,2"])
    assert result.exit_code == 5, result.output
    said = "error: measure_depth: depth 3 layers is over max 2 by 1; depth 3 layers is 0.750 times that of the unpruned model (4),"
    assert said.replace("measure_depth: ", "step 'measure_depth': layers 1: ") in result.stderr
    with Path("out/comparison/comparison.csv").open() as file:
        compared = [(row["layers"], row["depth (layers)"], row["depth (layers), standard error"]) for row in csv.DictReader(file)]
    assert compared == [("4", "4.000", "0.25"), ("2", "2.000", "0.25")]
    assert "2.000 ± 0.25" in Path("out/comparison/comparison.md").read_text()


@pytest.mark.full
def test_broken_plugin_is_reported_and_stops_only_its_users(recipe: Path, installed: dict[str, str]) -> None:
    shown = run_gradmap(installed, "stages").stdout
    assert "top_layers_score, measure_depth: from plugin gradmap_top_layers, gradmap-top-layers 1.0\n" in shown
    reason = "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
    assert f"left out: plugin broken_plugin: {reason}" in shown
    assert run_gradmap(installed, "check", str(recipe)).returncode == 0
    recipe.write_text(recipe.read_text().replace("top_layers_score", "broken_stage"))
    done = run_gradmap(installed, "check", str(recipe))
    assert done.returncode == 2
    assert "r.yaml:4:5: no stage named 'broken_stage'" in done.stderr
    assert f"plugin 'broken_plugin' is left out: {reason}" in done.stderr


def test_unknown_stage_is_described_by_its_neighbours() -> None:
    result = CliRunner().invoke(app, ["stages", "prun"])
    assert (result.exit_code, result.stderr) == (2, "error: no stage named 'prun'; did you mean 'prune'?\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def gradmap_stages", "def gradmap_stage"), r"unknown hook 'gradmap_stage'.*the only hook is gradmap_stages\(\)"),
        (("@hookimpl", ""), r"has no function gradmap_stages\(\) marked with @hookimpl"),
        (("return [Nothing]", "return Nothing"), r"must return a list of Stage classes, got the class Nothing"),
        (("return [Nothing]", "return ['Nothing']"), r"must return a list of Stage classes, got \['Nothing'\]"),
        (('    name = "do_nothing"\n', ""), "stage Nothing in .* must define 'name'"),
        (('    """Do nothing."""\n', ""), "stage 'do_nothing' needs a docstring"),
        (("class Inputs(BaseModel):\n        model: ModelGraph", "class Inputs(BaseModel):\n        model: int"),
         "stage 'do_nothing': Inputs.model must be an Artifact subclass, got <class 'int'>"),
        (("    class Inputs", "    speed: int = 3\n    class Inputs"), r"option 'speed' needs a Field\(description=\.\.\.\)"),
        (('name = "do_nothing"', 'name = "prune"'), "stage 'prune' is provided by both 'gradmap_plugins.prune' and '.*n.py'"),
        (("import BaseModel", "import BaseModels"), "n.py' cannot be imported: ImportError: cannot import name 'BaseModels'"),
        (("class Nothing(Stage):", "class Nothing(Stage)"), "n.py' cannot be imported: SyntaxError"),
        (("return [Nothing]", "return [Something]"), r"gradmap_stages\(\) failed: NameError: name 'Something' is not defined"),
    ],
)  # fmt: skip
def test_broken_contract(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in STAGE
    file = tmp_path / "n.py"
    file.write_text(STAGE.replace(*change))
    with pytest.raises(PluginError, match=message) as caught:
        load_catalog([file])
    assert caught.value.exit_code == 2


def test_whole_plugin_file(tmp_path: Path) -> None:
    file = tmp_path / "n.py"
    file.write_text(STAGE)
    catalog = load_catalog([file])
    assert catalog.plugin_of["do_nothing"] == str(file)
    code = catalog.code_of["do_nothing"].digest
    file.write_text(STAGE + "# edited\n")
    assert load_catalog([file]).code_of["do_nothing"].digest != code


@pytest.mark.parametrize("name", ["missing.py", "notes.txt"])
def test_plugin_that_is_no_python_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(PluginError, match=f"{name}' is not a Python file"):
        load_catalog([tmp_path / name])


def test_failing_forecast_names_the_plugin(tmp_path: Path, llama: Path) -> None:
    file = tmp_path / "n.py"
    file.write_text(STAGE.replace("    def run", "    def forecast(self, inputs):\n        return 1 / 0\n    def run"))
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: do_nothing\n")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml"), "--plugin", str(file)])
    assert result.exit_code == 2
    assert "forecast() of stage 'do_nothing'" in result.stderr
    assert "failed: ZeroDivisionError: division by zero" in result.stderr


def test_forecast_must_return_a_mapping(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "n.py").write_text(STAGE.replace("    def run", "    def forecast(self, inputs):\n        pass\n    def run"))
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: do_nothing\n")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml"), "--plugin", str(tmp_path / "n.py")])
    assert result.exit_code == 2
    assert "forecast() of stage 'do_nothing'" in result.stderr
    assert "must return a mapping of output names, got None" in result.stderr


OPTIONAL = """
from pydantic import BaseModel
from gradmap_pipeline import Evaluation, ModelGraph, Stage, hookimpl

class Maybe(Stage):
    \"\"\"Make nothing this time.\"\"\"
    name = "maybe_evaluate"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        evaluation: Evaluation | None = None
    def run(self, inputs, context):
        return self.Outputs()

class Needs(Stage):
    \"\"\"Need an evaluation.\"\"\"
    name = "need_evaluation"
    class Inputs(BaseModel):
        evaluation: Evaluation
    class Outputs(BaseModel):
        pass
    def run(self, inputs, context):
        return self.Outputs()

@hookimpl
def gradmap_stages():
    return [Maybe, Needs]
"""


def test_output_that_is_not_made(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("o.py").write_text(OPTIONAL)
    Path("r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: maybe_evaluate\n")
    assert [CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "o.py"]).exit_code for _ in range(2)] == [0, 0]
    with Path("r.yaml").open("a") as recipe:
        recipe.write("  - use: need_evaluation\n")
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "o.py"])
    assert result.exit_code == 4
    assert "step 'need_evaluation': needs 'maybe_evaluate.evaluation', which that step did not make this time" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("MemoryError()", 3, "stage 'do_nothing' ran out of memory: MemoryError"),
        ("OSError(28, 'No space left on device')", 3, "ran out of disk: [Errno 28] No space left on device"),
        ("__import__('gradmap_pipeline').OptionError('x', 'cannot be')", 4, "step 'do_nothing': cannot be"),
    ],
)
def test_exit_code_of_a_failing_stage(
    error: str, code: int, message: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("n.py").write_text(STAGE.replace("        return self.Outputs(model=inputs.model)", f"        raise {error}"))
    Path("r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: do_nothing\n")
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "n.py"])
    assert result.exit_code == code
    assert message in result.stderr


def test_our_stages_come_through_the_same_door() -> None:
    catalog: Catalog = load_catalog()
    assert not catalog.broken
    assert set(catalog.stages) >= {"calibrate", "gradmap_score", "prune", "project_compensate", "evaluate", "export"}
    assert all(catalog.plugin_of[name] == f"gradmap_plugins.{name}" for name in catalog.stages)
