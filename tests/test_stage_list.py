"""What is said of stages and the plugins they come from: lists, JSON, names that are not there, extras to install."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.extras import explain_missing

STAGE = '''
from collections.abc import Callable
from pydantic import BaseModel, Field
from gradmap_pipeline import ModelGraph, Stage, hookimpl

class Acme(Stage):
    """Do as Acme does.

    At length.
    """
    name = "acme_work"
    FIELDS
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        return self.Outputs(model=inputs.model)

@hookimpl
def gradmap_stages():
    return [Acme]
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    """Where distributions are installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: acme_work\n")
    for name in ("acme", "foo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "site"


def install(site: Path, entry: str, module: str, text: str) -> None:
    (site / f"{module}.py").write_text(text)
    information = site / f"{module}_stages-2.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-stages\nVersion: 2.5\n")
    (information / "entry_points.txt").write_text(f"[gradmap]\n{entry} = {module}\n")


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_list_names_distributions_and_versions(site: Path) -> None:
    own = f"from gradmap-pipeline {version('gradmap-pipeline')}"
    assert gradmap("stages").stdout.splitlines()[-1] == f"all: {own}"
    install(site, "acme_work", "acme", STAGE.replace("FIELDS", ""))
    lines = gradmap("stages").stdout.splitlines()
    assert lines[-2:] == ["acme_work: from plugin acme, acme-stages 2.5", f"all others: {own}"]
    assert gradmap("stages", "acme_work").stdout.startswith("acme_work (acme, acme-stages 2.5)\n\nDo as Acme does.\n")


def test_list_as_json(site: Path) -> None:
    install(site, "acme_work", "acme", STAGE.replace("FIELDS", 'speed: int = Field(3, ge=1, description="How fast.")'))
    install(site, "foo", "foo", "import nobody_has_this\n")
    result = gradmap("stages", "--json")
    listed = {stage["name"]: stage for stage in json.loads(result.stdout)}
    assert {"calibrate", "prune", "acme_work"} <= set(listed)
    assert listed["prune"]["distribution"] == "gradmap-pipeline"
    assert listed["prune"]["inputs"]["scores"] == {"types": ["LayerScores"], "required": False}
    acme = listed["acme_work"]
    properties = acme.pop("options")["properties"]
    assert properties == {"speed": {"default": 3, "description": "How fast.", "minimum": 1, "title": "Speed", "type": "integer"}}
    assert {key: acme[key] for key in ("name", "summary", "distribution", "version", "module", "inputs", "outputs")} == {
        "name": "acme_work",
        "summary": "Do as Acme does.",
        "distribution": "acme-stages",
        "version": "2.5",
        "module": "acme",
        "inputs": {"model": {"types": ["ModelGraph"], "required": True}},
        "outputs": {"model": "ModelGraph"},
    }
    assert result.stderr == "left out: plugin foo: ModuleNotFoundError: No module named 'nobody_has_this'\n"


def test_one_stage_as_json(site: Path) -> None:
    Path("own.py").write_text(STAGE.replace("FIELDS", ""))
    (stage,) = json.loads(gradmap("stages", "acme_work", "--json", "--plugin", "own.py").stdout)
    assert (stage["name"], stage["distribution"], stage["version"], stage["module"]) == ("acme_work", None, None, "own.py")
    result = gradmap("stages", "acme_wok", "--json", "--plugin", "own.py")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["message"] == "no stage named 'acme_wok'; did you mean 'acme_work'?"


def test_json_and_check_exclude_each_other(site: Path) -> None:
    result = gradmap("stages", "--json", "--check", "prune")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["message"] == "--json lists stages, and --check runs them; give one of the two"


def test_an_option_without_a_schema_hides_no_others(site: Path) -> None:
    field = 'how: Callable[[int], int] = Field(len, description="No JSON.")'
    install(site, "acme_work", "acme", STAGE.replace("FIELDS", field))
    listed = {stage["name"]: stage for stage in json.loads(gradmap("stages", "--json").stdout)}
    assert listed["acme_work"]["options"] == {"type": "object"}
    assert "options-of-acme_work" in json.loads(gradmap("schema").stdout)["$defs"]


REASON = "ModuleNotFoundError: No module named 'nobody_has_this'"


@pytest.mark.parametrize(
    ("entry", "name", "said"),
    [
        ("foo", "gradmap_scor", "; did you mean 'gradmap_score'?"),
        ("gradmap_scope", "gradmap_scor", f"; did you mean 'gradmap_score'?; plugin 'foo' is left out: {REASON}"),
        ("acme_work", "acme_work", f"; plugin 'foo' is left out: {REASON}"),
        ("acme", "acme_wrk", f"; plugin 'foo' is left out: {REASON}"),
        ("foo", "zzz", f"; plugin 'foo' is left out: {REASON}"),
    ],
)
def test_an_unknown_name_blames_only_plugins_that_may_have_it(entry: str, name: str, said: str, site: Path) -> None:
    install(site, entry, "foo", "import nobody_has_this\n")
    result = gradmap("stages", name)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: no stage named {name!r}; ")
    assert result.stderr.endswith(f"{said}\n")
    assert ("accepted: " in result.stderr) == (name in ("acme_wrk", "zzz"))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("fast", "pip install 'acme-stages[fast]'"),
        ("", "acme-stages names no extra that has it"),
        ("onnx", "pip install 'gradmap-pipeline[onnx]'"),
    ],
)
def test_what_is_missing_is_installed_with_the_distribution_that_asks(extra: str, said: str, site: Path) -> None:
    fields = f'requires = ("nobody_has_this.part",)\n    extra = {extra!r}'
    install(site, "acme_work", "acme", STAGE.replace("FIELDS", fields))
    result = gradmap("check", "r.yaml")
    assert result.exit_code == 2
    assert f"step 'acme_work' needs nobody_has_this.part, which is not installed: {said}\n" in result.stderr


def test_what_our_stages_miss_is_installed_with_our_extra() -> None:
    message = "needs nobody_has_this, which is not installed: pip install 'gradmap-pipeline[mka]'"
    assert explain_missing(["json", "nobody_has_this"], "mka") == message
    assert explain_missing(["json"], "mka") is None
