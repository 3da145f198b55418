"""Stages and options under their old names, names that are refused, and plugins for other versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import gradmap_pipeline
from gradmap_pipeline.api import HOMES, RENAMED
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import PluginError
from gradmap_pipeline.recipe import moved_names
from gradmap_pipeline.recipe.catalog import load_catalog

PLUGIN = '''
from typing import ClassVar
from pydantic import BaseModel, Field
from gradmap_pipeline import Artifact, ModelGraph, OptionError, Stage, hookimpl

class Told(Artifact):
    number: int = 1

class Work(Stage):
    """Do the work."""
    name = "new_work"
    aliases = ("old_work", "older_work")
    renamed = {"pace": "speed"}
    speed: int = Field(ge=1, description="How fast.")
    load: int = Field(0, description="How much.", deprecated="it has no effect")
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        told: Told
    def forecast(self, inputs):
        if self.speed == 9:
            raise OptionError("speed", "is too high")
        return {}
    def run(self, inputs, context):
        return self.Outputs(told=Told(number=self.speed))

@hookimpl
def gradmap_stages():
    return [Work]
'''
OPTION = "r.yaml:6:12: option 'pace' of stage 'new_work' is now called 'speed'; write that"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("p.py").write_text(PLUGIN)
    write_recipe(llama, "old_work", "{pace: 2}")
    return llama


def write_recipe(model: Path, stage: str, options: str, step: str = "s") -> None:
    Path("r.yaml").write_text(
        f"version: 1\nmodel: {{path: {model}}}\nsteps:\n  - use: {stage}\n    id: {step}\n    with: {options}\n"
    )


def gradmap(command: str, *arguments: str) -> Result:
    recipe = [] if command in ("stages", "schema") else ["r.yaml"]
    return CliRunner().invoke(app, [command, *recipe, *arguments, "--plugin", "p.py"])


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_old_names_work_and_are_told_once(command: str, folder: Path) -> None:
    result = gradmap(command)
    assert result.exit_code == 0, result.stderr
    lines = [line.strip() for line in result.stdout.splitlines() if "now called" in line]
    assert lines == ["r.yaml:4:5: stage 'old_work' is now called 'new_work'; write `use: new_work`", OPTION]


def test_present_names_are_told_nothing(folder: Path) -> None:
    write_recipe(folder, "new_work", "{speed: 2}")
    result = gradmap("check")
    assert (result.exit_code, result.stdout) == (0, "r.yaml: no problems in 1 step\n")


def test_a_step_known_by_the_old_name_is_told_how_it_is_called_then(folder: Path) -> None:
    Path("r.yaml").write_text(Path("r.yaml").read_text().replace("    id: s\n", ""))
    line = "write `use: new_work`, and 'new_work' where the recipe speaks of step 'old_work'\n"
    assert line in gradmap("check", "--set", "old_work.pace=3").stdout


def cached(*arguments: str) -> bool:
    result = gradmap("run", "--json", *arguments)
    assert result.exit_code == 0, result.stdout
    (event,) = [entry for line in result.stdout.splitlines() if (entry := json.loads(line))["event"] == "step_finished"]
    return bool(event["cached"])


def test_results_are_found_under_either_name(folder: Path) -> None:
    assert not cached()
    write_recipe(folder, "new_work", "{speed: 2}")
    assert cached()
    write_recipe(folder, "older_work", "{speed: 2}")
    assert cached()
    assert not cached("--set", "s.speed=3")


def test_both_names_of_an_option_exclude_each_other(folder: Path) -> None:
    write_recipe(folder, "new_work", "{pace: 2, speed: 2}")
    result = gradmap("check")
    message = "step 's': option 'pace': is now called 'speed', and 'speed' is given too; leave 'pace' out"
    assert (result.exit_code, result.stderr) == (2, f"error: r.yaml:6:12: {message}\n")


@pytest.mark.parametrize(("written", "given"), [("pace", "speed"), ("speed", "pace")])
def test_the_command_line_stands_for_the_option_of_the_file_under_either_name(written: str, given: str, folder: Path) -> None:
    write_recipe(folder, "new_work", f"{{{written}: 2}}")
    assert not cached("--set", f"s.{given}=5")
    write_recipe(folder, "new_work", "{speed: 5}")
    assert cached()


@pytest.mark.parametrize(("value", "said"), [("0", "found 0, accepted: at least 1"), ("9", "is too high")])
def test_a_wrong_value_is_told_at_its_place_under_the_old_name(value: str, said: str, folder: Path) -> None:
    write_recipe(folder, "new_work", f"{{pace: {value}}}")
    result = gradmap("check")
    assert result.exit_code == 2
    assert result.stderr == f"error: r.yaml:6:12: step 's': option 'speed': {said}\n"


def test_deprecated_options_and_stages_are_told(folder: Path) -> None:
    write_recipe(folder, "new_work", "{speed: 2, load: 3}")
    assert "option 'load' of stage 'new_work' is deprecated: it has no effect\n" in gradmap("check").stdout
    Path("p.py").write_text(PLUGIN.replace("    renamed", '    deprecated = "use prune"\n    renamed'))
    assert "r.yaml:4:5: stage 'new_work' is deprecated: use prune\n" in gradmap("check").stdout
    assert "new_work                Do the work. (deprecated)\n" in gradmap("stages").stdout
    shown = gradmap("stages", "new_work").stdout
    assert "\ndeprecated: use prune\n" in shown
    assert "      How much. Deprecated: it has no effect.\n" in shown
    (stage,) = json.loads(gradmap("stages", "new_work", "--json").stdout)
    assert (stage["deprecated"], stage["aliases"]) == ("use prune", ["old_work", "older_work"])


def test_a_stage_is_described_under_its_old_name(folder: Path) -> None:
    shown = gradmap("stages", "old_work").stdout
    assert shown == gradmap("stages", "new_work").stdout
    assert "\nformerly: old_work, older_work\n" in shown
    assert "      How fast.\n      Formerly: pace.\n" in shown


def test_editors_accept_old_names(folder: Path) -> None:
    schema = json.loads(gradmap("schema").stdout)
    step = schema["properties"]["steps"]["items"]
    use = step["properties"]["use"]
    told = dict(zip(use["enum"], use["enumDescriptions"], strict=True))
    assert told["old_work"] == f"Is now called 'new_work'. {told['new_work']}"
    (then,) = [
        one["then"] for one in step["allOf"] if one["if"]["properties"]["use"]["pattern"] == "^(new_work|old_work|older_work)$"
    ]
    assert then["properties"]["with"] == {"$ref": "#/$defs/options-of-new_work"}
    options = schema["$defs"]["options-of-new_work"]
    assert options["properties"]["pace"]["deprecated"] is True
    assert options["required"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "new_work"', 'name = "New-Work"'), "class Work in p.py has the name 'New-Work'; names are lower-case words"),
        (('name = "new_work"', 'name = "work_"'), "class Work in p.py has the name 'work_'; names are lower-case words"),
        (('"older_work"', '"older work"'), "class Work in p.py has the name 'older work'; names are"),
        (('("old_work", "older_work")', '"old_work"'), "class Work in p.py: 'aliases' must be a tuple of names, got 'old_work'"),
        (('"older_work"', '"prune"'), "stage 'prune' is provided by both 'gradmap_plugins.prune' and 'p.py'; rename one"),
        (("[Work]", "[Work, Work]"), "class Work in p.py has the name 'new_work', which is that of class Work too; rename one"),
        (('"pace": "speed"', '"pace": "tempo"'), "'renamed' leads from 'pace' to 'tempo', which is not an option"),
        (('"pace": "speed"', '"load": "speed"'), "'renamed' has 'load', which is still an option"),
        (('{"pace": "speed"}', '["pace"]'), "'renamed' must be a mapping of old options to new, got ['pace']"),
        (("    renamed", "    deprecated = True\n    renamed"), "'deprecated' must say in a text what to use instead, got True"),
        (("    renamed", '    requires_api = "new"\n    renamed'), "requires_api must be such as '>=1', got 'new'"),
        (("    renamed", '    requires_api = ">=2"\n    renamed'),
         "plugin 'p.py' needs plugin API >=2, and this gradmap-pipeline has 1; upgrade gradmap-pipeline"),
        (("class Told", 'requires_api = "<1"\nclass Told'), "API <1, and this gradmap-pipeline has 1; upgrade the plugin"),
        (("Artifact, Mod", "Artifact, Nonsense, Mod"),
         "there is no 'Nonsense' in 'gradmap_pipeline' in this version (plugin API 1); docs/write-a-plugin.md says"),
        (("class Told", "import gradmap_pipeline.nonsense\nclass Told"),
         "there is no module 'gradmap_pipeline.nonsense' in this version (plugin API 1); docs/write-a-plugin.md"),
        (("class Told", "import gradmap_pipeline\ngradmap_pipeline.Nonsense\nclass Told"),
         "cannot be imported: there is no 'Nonsense' in 'gradmap_pipeline' in this version"),
        (("class Told", "from gradmap_pipeline.errors import Nonsense\nclass Told"),
         "cannot be imported: there is no 'Nonsense' in 'gradmap_pipeline.errors' in this version"),
    ],
)  # fmt: skip
def test_what_a_plugin_may_not_be_called(change: tuple[str, str], message: str, folder: Path) -> None:
    assert change[0] in PLUGIN
    Path("p.py").write_text(PLUGIN.replace(*change))
    with pytest.raises(PluginError) as caught:
        load_catalog([Path("p.py")])
    assert message in str(caught.value)
    assert "p.py" in str(caught.value)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from gradmap_pipeline.machine.group import Group",
         "no module 'gradmap_pipeline.machine.group' in this version (plugin API 1); import ProcessGroup (for Group) from"),
        ("from gradmap_pipeline.model.checkpoint import load_tensor",
         "no module 'gradmap_pipeline.model' in this version (plugin API 1); import load_tensor from gradmap_pipeline; docs/"),
        ("from gradmap_pipeline.model.finite import (\n    find_weights,\n    not_finite,\n)",
         "import find_nonfinite_weights (for find_weights), explain_nonfinite (for not_finite) from gradmap_pipeline; docs/"),
        ("from gradmap_pipeline.sweep.parts import PartedSweep", "import SamplePass (for PartedSweep) from gradmap_pipeline;"),
        ("from gradmap_pipeline.cost.rehearsal import Rehearsal", "import ModelCosts (for Rehearsal) from gradmap_pipeline; docs/"),
        ("from gradmap_pipeline.stages.survey import Survey", "import StructureProbe (for Survey) from gradmap_pipeline; docs/"),
        ("from gradmap_pipeline.checkpoint.twins import check_twins", "import check_same_layers (for check_twins) from gradmap"),
        ("from gradmap_pipeline.model.sweep import Sweep", "import open_sweep (for Sweep) from gradmap_pipeline; docs/"),
        ("import gradmap_pipeline.machine.partial as partial", "1); import FolderExport from gradmap_pipeline; docs/"),
        ("from gradmap_pipeline.correction.correction import find_output",
         "there is no 'find_output' in 'gradmap_pipeline.correction.correction' in this version (plugin API 1); "
         "import find_output_site (for find_output) from gradmap_pipeline; docs/write-a-plugin.md says what plugins may use"),
        ("from gradmap_pipeline.nonsense import Nonsense",
         "(plugin API 1); docs/write-a-plugin.md says what plugins may use; a newer gradmap-pipeline may have it"),
        ("from gradmap_pipeline import Survey", "'Survey' is called 'StructureProbe' now"),
    ],
)  # fmt: skip
def test_a_plugin_is_told_the_public_name_of_what_has_moved(statement: str, message: str, folder: Path) -> None:
    Path("p.py").write_text(PLUGIN.replace("class Told", f"{statement}\nclass Told"))
    result = gradmap("stages", "new_work")
    assert result.exit_code == 2
    assert message in result.stderr
    indented = statement.replace("\n", "\n        ")
    Path("p.py").write_text(
        PLUGIN.replace("def run(self, inputs, context):", f"def run(self, inputs, context):\n        {indented}")
    )
    write_recipe(folder, "new_work", "{speed: 2}")
    result = gradmap("run")
    assert result.exit_code == 4
    assert "stage 'new_work' (p.py) failed: " in result.stderr
    assert message.rstrip(";") in result.stderr


def test_every_name_that_takes_the_place_of_another_is_public() -> None:
    replacing = {**moved_names.REPLACED, **moved_names.MODULES, **RENAMED}
    assert set(replacing.values()) <= set(HOMES)
    assert set(HOMES) & {*moved_names.REPLACED, *RENAMED} == {"Sweep"}


@pytest.mark.parametrize("place", ["    renamed", "class Told"])
def test_a_plugin_for_this_version_is_taken(place: str, folder: Path) -> None:
    indent = place[: len(place) - len(place.lstrip())]
    Path("p.py").write_text(PLUGIN.replace(place, f'{indent}requires_api = ">=1,<2"\n{place}'))
    assert "new_work" in load_catalog([Path("p.py")]).stages
    assert gradmap_pipeline.API_VERSION == 1


def test_an_installed_plugin_for_another_version_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    information = tmp_path / "site" / "later-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: later\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[gradmap]\nnew_work = later\n")
    (tmp_path / "site" / "later.py").write_text('requires_api = ">=2"\n' + PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "later", raising=False)
    reason = "needs plugin API >=2, and this gradmap-pipeline has 1; upgrade gradmap-pipeline"
    listed = CliRunner().invoke(app, ["stages"]).stdout
    assert f"left out: plugin later: {reason}\n" in listed
    checked = CliRunner().invoke(app, ["check", "r.yaml", "--set", "s.pace=1"])
    assert checked.exit_code == 2
