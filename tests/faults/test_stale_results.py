"""A result is used again only while all the code that made it is the same; and it is not thrown away for other code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.stage_code import StageCode

pytestmark = pytest.mark.full

STAGE = '''
from pydantic import BaseModel
from gradmap_pipeline import ModelGraph, Stage, hookimpl
from . import tables

class Swap(Stage):
    """Swap nothing."""
    name = "swap_nothing"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        from swapper.inner.late import change
        return self.Outputs(model=change(inputs.model))

@hookimpl
def gradmap_stages():
    return [Swap]
'''
MACHINERY = (
    "__main__", "api", "cli", "cost", "errors", "export.verify", "interruptions", "machine.extras", "machine.input_files",
    "machine.machine", "machine.processes", "machine.shortages", "machine.streams", "machine.supervision", "recipe", "report",
    "run", "stages.exporting", "stages.removal", "testing", "text",
)  # fmt: skip
"""Packages and modules that find, wire, run, keep and report steps, and decide nothing about what a stage computes."""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution with one stage, which uses modules of its own at import and, in `run`, later."""
    files = {
        "swapper/__init__.py": "",
        "swapper/stage.py": STAGE,
        "swapper/tables.py": "SIZE = 1\n",
        "swapper/unused.py": "X = 1\n",
        "swapper/inner/__init__.py": "",
        "swapper/inner/late.py": "from ..tables import SIZE\nfrom swapper_core import core\ndef change(model):\n    return model\n",
        "swapper_core/__init__.py": "",
        "swapper_core/core.py": "Y = 1\n",
        "swapper-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: swapper\nVersion: 1.0\n",
        "swapper-1.0.dist-info/entry_points.txt": "[gradmap]\nswap_nothing = swapper.stage\n",
        "swapper-1.0.dist-info/top_level.txt": "swapper\nswapper_core\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("swapper", "swapper_core")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def code() -> str:
    return load_catalog().code_of["swap_nothing"].digest


@pytest.mark.parametrize("edited", ["stage", "tables", "inner/late", "inner/__init__", "__init__", "../swapper_core/core"])
def test_editing_any_module_behind_a_stage_is_noticed(edited: str, plugin: Path) -> None:
    before = code()
    assert code() == before
    with (plugin / "swapper" / f"{edited}.py").open("a") as file:
        file.write("# edited\n")
    assert code() != before


def test_another_version_of_a_plugin_is_noticed(plugin: Path) -> None:
    """Also where its sources are the same: data files may differ."""
    before = code()
    metadata = plugin / "swapper-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    assert code() != before


def test_module_that_a_stage_does_not_use_changes_nothing(plugin: Path) -> None:
    before = code()
    (plugin / "swapper" / "unused.py").write_text("X = 2\n")
    assert code() == before


def test_helper_beside_a_plugin_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = STAGE.replace("from . import tables", "import beside_helper").replace("swapper.inner.late", "beside_late")
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "beside_helper.py").write_text("A = 1\n")
    (tmp_path / "beside_late.py").write_text("B = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for helper in ("beside_helper", "beside_late"):
        before = load_catalog([tmp_path / "mine.py"]).code_of["swap_nothing"].digest
        (tmp_path / f"{helper}.py").write_text("A = 2\n")
        assert load_catalog([tmp_path / "mine.py"]).code_of["swap_nothing"].digest != before


def test_code_that_no_result_depends_on_discards_none() -> None:
    """A typo mended in the command line must not cost days."""
    for name, stage_code in load_catalog().code_of.items():
        ours = {module.removeprefix("gradmap_pipeline.") for module in stage_code.files}
        deciding_nothing = {"cli.commands", "errors", "export.verify", "recipe.catalog", "recipe.plan", "recipe.recipe"}
        assert not ours & {*deciding_nothing, "run.costs", "run.keys", "run.runner", "run.store"}, name


def test_method_of_another_stage_discards_none() -> None:
    files = load_catalog().code_of["prune"].files
    assert "gradmap_pipeline.checkpoint.depth" in files
    assert "gradmap_pipeline.correction.ridge" not in files
    assert "gradmap_plugins.project_compensate" not in files


def test_all_code_that_a_run_loads_is_behind_a_stage_or_machinery(tmp_path: Path, llama: Path, text: Path) -> None:
    """The sources are read for imports; whatever they hide from that shows here."""
    (tmp_path / "r.yaml").write_text(f"""\
version: 1
model: {{path: {llama}}}
steps:
  - use: calibrate
    with: {{dataset: {{path: {text}}}, samples: 4, sequence_length: 16}}
  - use: gradmap_score
    with: {{layers: 1}}
  - use: prune
    with: {{layers: 1}}
  - use: project_compensate
  - use: export
    with: {{to: out}}
  - use: evaluate
    with: {{dataset: {{path: {text}}}, samples: 4, sequence_length: 16}}
""")
    script = """
import sys
from gradmap_pipeline.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
print(*(name for name in sys.modules if name.startswith("gradmap_pipeline.")), file=sys.__stdout__)
"""
    command = [sys.executable, "-c", script, "run", "r.yaml", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    behind = {module for code in load_catalog().code_of.values() for module in code.files}
    assert "gradmap_pipeline.sweep.sweep" in done.stdout.split()
    hidden = [name for name in done.stdout.split() if name not in behind and not is_machinery(name)]
    assert sorted(hidden) == []


def is_machinery(module: str) -> bool:
    return any(f"{module}.".startswith(f"gradmap_pipeline.{name}.") for name in MACHINERY)


def test_code_is_the_same_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "moved.py").write_text("from gradmap_pipeline import Stage\n")
        monkeypatch.syspath_prepend(tmp_path / place)
        digests.append(StageCode("moved", None, ("moved",)).digest)
    assert digests[0] == digests[1]


def test_result_of_code_that_is_edited_while_it_runs_is_not_kept(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edits = "with open(__file__, 'a') as own_source: own_source.write('# edited')"
    text = STAGE.replace("from . import tables\n", "").replace("from swapper.inner.late import change", edits)
    (tmp_path / "edits.py").write_text(text.replace("change(inputs.model)", "inputs.model"))
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: swap_nothing\n")
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "edits.py"])
    assert result.exit_code == 4
    assert "step 'swap_nothing': stage 'swap_nothing': its source files have changed while it ran" in result.stderr
    assert list((tmp_path / ".gradmap" / "steps").iterdir()) == []
