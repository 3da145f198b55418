"""A second `gradmap check` looks at the model again only where something has changed that its stages look at.

After an edit of the recipe, stages look again, and what they ask of the model's structure is known.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_model
from typer.testing import CliRunner

from gradmap_pipeline import ModelError, ModelGraph, StructureProbe
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.run import verdicts
from gradmap_pipeline.sweep.layerwise import LayerwiseModel

RECIPE = """\
version: 1
model: {path: model}
steps:
  - use: calibrate
    with: {dataset: {path: text.txt}, samples: 4, sequence_length: 16}
  - use: gradmap_score
    with: {layers: 1}
  - use: prune
    with: {layers: 1}
  - use: export
    with: {to: out, overwrite: true}
"""
PLUGIN = """
from pydantic import BaseModel
from gradmap_pipeline import ModelGraph, Stage, hookimpl
class Same(Stage):
    "Give back the model."
    name = "same"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def forecast(self, inputs):
        return {"model": inputs.of(ModelGraph)}
    def run(self, inputs, context):
        return self.Outputs(model=inputs.model)
@hookimpl
def gradmap_stages():
    return [Same]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "model")
    shutil.copy(text, "text.txt")
    Path("r.yaml").write_text(RECIPE)
    Path("p.py").write_text(PLUGIN)
    Path("out").mkdir()
    Path("out/config.json").write_text("{}\n\n")
    return tmp_path


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans whose model was looked at."""
    seen: list[Any] = []

    def look(plan: Any, _: Any) -> bool:
        seen.append(plan)
        return True

    monkeypatch.setattr(verdicts, "inspect_plan", look)
    return seen


def check() -> None:
    result = CliRunner().invoke(app, ["check", "r.yaml", "--plugin", "p.py"])
    assert result.exit_code == 0, result.output


def test_what_was_well_is_looked_at_once(looks: list[Any]) -> None:
    for _ in range(3):
        check()
    assert len(looks) == 1
    assert Path(".gradmap/.gitignore").read_text() == "*\n"


def test_a_verdict_leaves_no_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is held while this test looks, so that nothing clears drafts away."""
    stores: list[Any] = []
    prepare = verdicts.Store.prepare
    monkeypatch.setattr(verdicts.Store, "prepare", lambda store: (stores.append(store), prepare(store)))
    check()
    assert len(stores) == 1
    assert list(Path(".gradmap/units").glob("check-*.json"))
    assert not list(Path(".gradmap").rglob("*.partial-*"))


def change_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def use_other_model() -> None:
    shutil.copytree("model", "other")
    Path("r.yaml").write_text(RECIPE.replace("path: model", "path: other"))


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "an option": lambda _: Path("r.yaml").write_text(RECIPE.replace("samples: 4", "samples: 5")),
    "a step": lambda _: Path("r.yaml").write_text(RECIPE + "  - use: same\n"),
    "another model": lambda _: use_other_model(),
    "a byte of the weights": lambda _: change_byte(Path("model/model.safetensors")),
    "a file beside them": lambda _: Path("model/added.txt").touch(),
    "a byte of the text": lambda _: change_byte(Path("text.txt")),
    "an earlier export": lambda _: change_byte(Path("out/config.json")),
    "what is installed": lambda patch: patch.setattr("sys.path", [*sys.path, "/elsewhere/site-packages"]),
    "programs": lambda patch: patch.setenv("PATH", "/elsewhere"),
    "the version of a library": lambda patch: patch.setattr(verdicts, "version_of", lambda library: f"9.{library}"),
    "Python": lambda patch: patch.setattr("platform.python_version", lambda: "3.99.1"),
    "code of this package": lambda patch: patch.setattr(verdicts, "_SHIPPED", ("gradmap_pipeline",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_looked_at_again(change: str, looks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check()
    CHANGES[change](monkeypatch)
    check()
    assert len(looks) == 2
    check()
    assert len(looks) == 2


def test_code_of_a_plugin_counts(looks: list[Any]) -> None:
    Path("r.yaml").write_text(RECIPE + "  - use: same\n")
    check()
    Path("p.py").write_text(PLUGIN.replace("Give back the model", "Hand on the model"))
    check()
    assert len(looks) == 2


def run(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object], *, is_cached: bool = False) -> int:
    """A run that computes nothing, and takes its first step from the store or not."""

    def run_plan(*_: Any, **__: Any) -> Any:
        meanwhile()
        return SimpleNamespace(finished=[SimpleNamespace(cached=is_cached)], answers={})

    with monkeypatch.context() as patch:
        patch.setattr("gradmap_pipeline.run.runner.run_plan", run_plan)
        return CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "p.py"]).exit_code


def export() -> None:
    change_byte(Path("out/config.json"))


def test_what_a_run_has_shown_is_not_looked_at(looks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, export) == 0
    check()
    assert not looks
    change_byte(Path("text.txt"))
    check()
    assert len(looks) == 1


def fail() -> None:
    raise ModelError("no room for it here")


@pytest.mark.parametrize(
    ("meanwhile", "is_cached", "code"), [(fail, False, 2), (export, True, 0), (lambda: change_byte(Path("text.txt")), False, 0)]
)
def test_run_has_shown_nothing_where_it_fails_or_computes_nothing_or_its_text_changes(
    meanwhile: Callable[[], object], is_cached: bool, code: int, looks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first step comes from the store, its stage has not looked at what is there now."""
    assert run(monkeypatch, meanwhile, is_cached=is_cached) == code
    check()
    assert len(looks) == 1


def test_what_is_known_is_not_written_again() -> None:
    """Another run, which computes all steps, leaves the files of what is known as they are."""
    written = []
    for _ in range(2):
        result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "p.py"])
        assert result.exit_code == 0, result.output
        written.append({file.name: file.stat().st_ino for file in Path(".gradmap").glob("units/*.json")})
        shutil.rmtree(".gradmap/steps")
    before, after = written
    assert {"check", "structure"} <= {name.partition("-")[0] for name in before}
    assert {name: after[name] for name in before} == before


def test_recipe_that_init_wrote_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["init", "model"]).exit_code == 0
    monkeypatch.setattr(verdicts, "inspect_plan", lambda *_: pytest.fail("looked at again"))
    result = CliRunner().invoke(app, ["check", "recipe.yaml"])
    assert result.exit_code == 0, result.output


def test_what_is_refused_is_looked_at_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def refuse(plan: Any, _: Any) -> bool:
        looks.append(plan)
        raise ModelError("no room for it here")

    monkeypatch.setattr(verdicts, "inspect_plan", refuse)
    for _ in range(2):
        result = CliRunner().invoke(app, ["check", "r.yaml"])
        assert (result.exit_code, "no room for it here" in result.stderr) == (2, True)
    assert len(looks) == 2


def test_what_changes_meanwhile_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as it was before the second check."""
    looks = []

    def change(plan: Any, _: Any) -> bool:
        looks.append(plan)
        monkeypatch.setenv("PATH", "/elsewhere")
        return True

    monkeypatch.setattr(verdicts, "inspect_plan", change)
    path = os.environ["PATH"]
    for _ in range(2):
        check()
        monkeypatch.setenv("PATH", path)
    assert len(looks) == 2


def test_what_there_was_no_memory_to_try_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("gradmap_pipeline.run.inspection.default_budget", lambda _: 1000)
        check()
    assert not list(Path(".").glob(".gradmap/units/*"))
    check()
    assert sorted(file.name.partition("-")[0] for file in Path(".").glob(".gradmap/units/*")) == ["check", "structure"]


def test_damaged_verdict_counts_as_none(looks: list[Any]) -> None:
    check()
    (kept,) = Path(".gradmap/units").glob("check-*.json")
    kept.write_text(kept.read_text().replace('"well"', '"bad!"'))
    check()
    assert len(looks) == 2


def test_store_that_cannot_be_written_is_no_obstacle(looks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(verdicts.Store, "prepare", refuse)
    check()
    check()
    assert len(looks) == 2


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were built to try their layers."""
    built: list[Any] = []
    make = LayerwiseModel.__init__

    def build(model: LayerwiseModel, graph: ModelGraph, **options: Any) -> None:
        built.append(graph)
        make(model, graph, **options)

    monkeypatch.setattr(LayerwiseModel, "__init__", build)
    return built


CORRECTED = RECIPE.replace("  - use: export", "  - use: project_compensate\n    with: {rescale: true}\n  - use: export")
OF_THE_RECIPE = ("an option", "a byte of the text", "an earlier export")


@pytest.mark.parametrize("change", CHANGES)
def test_structure_of_a_model_is_tried_once(change: str, tries: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check()
    first = len(tries)
    assert first > 0
    CHANGES[change](monkeypatch)
    check()
    assert len(tries) == (first if change in OF_THE_RECIPE else 2 * first)


def test_new_stage_asks_what_it_alone_wants_to_know(tries: list[Any]) -> None:
    check()
    first = len(tries)
    for options in ("samples: 4", "samples: 5"):
        Path("r.yaml").write_text(CORRECTED.replace("samples: 4", options))
        check()
    assert len(tries) == first + 1


def test_answers_to_what_came_before_a_refusal_are_kept(tries: list[Any]) -> None:
    refuse = (
        "def inspect(self, inputs, probe):\n"
        "        if Path('full').exists():\n"
        "            raise ModelError('no room for it here')\n"
        "    def run"
    )
    text = PLUGIN.replace("def run", refuse).replace("import ModelGraph", "import ModelError, ModelGraph")
    Path("p.py").write_text("from pathlib import Path\n" + text)
    Path("full").touch()
    Path("r.yaml").write_text(CORRECTED + "  - use: same\n")
    result = CliRunner().invoke(app, ["check", "r.yaml", "--plugin", "p.py"])
    assert (result.exit_code, "no room for it here" in result.stderr) == (2, True)
    first = len(tries)
    assert first > 0
    Path("full").unlink()
    check()
    assert len(tries) == first


def test_recipe_that_is_edited_after_its_run_is_known(tries: list[Any]) -> None:
    Path("r.yaml").write_text(CORRECTED)
    assert CliRunner().invoke(app, ["run", "r.yaml", "--threads", "1"]).exit_code == 0
    run = len(tries)
    Path("r.yaml").write_text(CORRECTED.replace("samples: 4", "samples: 5"))
    check()
    assert len(tries) == run


def test_edited_recipe_is_checked_without_torch() -> None:
    """Which takes seconds to import."""
    check()
    Path("r.yaml").write_text(RECIPE.replace("samples: 4", "samples: 5"))
    program = "import sys; from gradmap_pipeline.cli import app; app(['check', 'r.yaml'], standalone_mode=False)"
    run_python(program + "; assert not {'torch', 'transformers.modeling_utils'} & set(sys.modules), sorted(sys.modules)")
    Path("r.yaml").write_text(CORRECTED)
    run_python(program + "; assert 'torch' in sys.modules")


def run_python(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "mixtral"])
def test_answers_are_the_same_from_the_store(model_type: str, tmp_path: Path) -> None:
    graph = open_folder(make_model(tmp_path / model_type, model_type))
    kept: dict[str, Any] = {}
    first = StructureProbe(graph, 1 << 30, answers=kept)
    found = first.find_sites()
    assert any(found.values())
    again = StructureProbe(graph, 1 << 30, answers=json.loads(json.dumps(kept)))
    assert again.find_sites() == found
    assert [site.has_bias for sites in again.find_sites().values() for site in sites] == [
        site.has_bias for sites in found.values() for site in sites
    ]
