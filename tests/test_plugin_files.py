"""Plugin files and the modules beside them: each file has its own, here and in another Python, and they count as its code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.recipe.catalog import load_catalog

PLUGIN = '''
from pydantic import BaseModel
from gradmap_pipeline import ModelGraph, Stage, hookimpl
import helper
import inner.deep
from helper import Told
from . import other

class Tell(Stage):
    """Tell what the helpers say."""
    name = "tell_NAME"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        told: Told
    def run(self, inputs, context):
        from late import said
        return Tell.Outputs(told=Told(words=[helper.WORD, inner.deep.WORD, other.WORD, said]))

@hookimpl
def gradmap_stages():
    return [Tell]
'''


def write_folder(folder: Path, name: str) -> Path:
    """A plugin file whose neighbours have names that those of others have too."""
    files = {
        "p.py": PLUGIN.replace("NAME", name),
        "helper.py": f"from gradmap_pipeline import Artifact\nWORD = {name!r}\nclass Told(Artifact):\n    words: list[str]\n",
        "inner/__init__.py": "",
        "inner/deep.py": "import json, other\nfrom .. import other as same\nassert json.dumps(other is same) == 'true'\n"
        "WORD = other.WORD\n",
        "other.py": f"WORD = 'other {name}'\n",
        "late.py": f"said = 'late {name}'\n",
        "json.py": "raise RuntimeError('not the one of the standard library')\n",
        "unused.py": "",
    }
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder / "p.py"


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> list[str]:
    """Arguments that name two plugin files."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_folder(tmp_path / name, name)
    steps = [{"use": "tell_one"}, {"use": "tell_two"}]
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    return ["--plugin", "one/p.py", "--plugin", "two/p.py"]


def run(arguments: list[str]) -> dict[str, Any]:
    """By step: what is told, and whether it comes from the store."""
    result = CliRunner().invoke(app, ["run", "r.yaml", "--json", *arguments])
    assert result.exit_code == 0, result.stdout
    events = [json.loads(line) for line in result.stdout.splitlines()]
    return {
        event["step"]: (event["outputs"]["told"]["words"], event["cached"]) for event in events if event["event"] == "step_finished"
    }


def test_each_file_has_its_own_neighbours(two: list[str]) -> None:
    before = [*sys.path]
    assert run(two) == {
        f"tell_{name}": ([name, f"other {name}", f"other {name}", f"late {name}"], False) for name in ("one", "two")
    }
    assert sys.path == before
    assert not {"helper", "inner", "other", "late"} & set(sys.modules)
    assert not list(Path("one").rglob("__pycache__"))


def test_neighbours_are_there_in_another_python_too(two: list[str]) -> None:
    recipe = json.loads(Path("r.yaml").read_text())
    recipe["steps"][1]["run"] = {"python": sys.executable}
    Path("r.yaml").write_text(json.dumps(recipe))
    told = run(two)
    assert told["tell_two"] == (["two", "other two", "other two", "late two"], False)


@pytest.mark.parametrize("edited", ["p", "helper", "inner/deep", "inner/__init__", "other", "late"])
def test_an_edited_neighbour_runs_the_step_again(edited: str, two: list[str]) -> None:
    run(two)
    assert [cached for _, cached in run(two).values()] == [True, True]
    with Path(f"one/{edited}.py").open("a") as file:
        file.write("# edited\n")
    assert [cached for _, cached in run(two).values()] == [False, True]


def test_what_an_edited_neighbour_says_is_what_is_told(two: list[str]) -> None:
    """Also within the second in which its bytecode would have been kept, and where its size is the same."""
    run(two)
    Path("one/late.py").write_text("said = 'LATE one'\n")
    assert run(two)["tell_one"][0][-1] == "LATE one"


def test_files_that_a_plugin_does_not_import_change_nothing(two: list[str]) -> None:
    run(two)
    for name in ("unused", "json"):
        Path(f"one/{name}.py").write_text("x = 1\n")
    assert [cached for _, cached in run(two).values()] == [True, True]


def test_code_of_a_plugin_file_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    files = [write_folder(tmp_path / place, "same") for place in ("a", "b")]
    codes = [load_catalog([file]).code_of["tell_same"] for file in files]
    assert codes[0].digest == codes[1].digest
    assert {name for name in codes[0].files if not name.startswith("gradmap_pipeline.")} == {
        "p", "helper", "inner", "inner.deep", "other", "late"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["two-words.py", "a.b.py", "json.py"])
def test_a_plugin_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    file = write_folder(tmp_path, "any").rename(tmp_path / name)
    code = load_catalog([file]).code_of["tell_any"]
    assert file in code.files.values()


def test_files_in_one_folder_share_what_is_beside_them(tmp_path: Path) -> None:
    file = write_folder(tmp_path, "first")
    (tmp_path / "q.py").write_text(PLUGIN.replace("NAME", "second"))
    stages = load_catalog([file, tmp_path / "q.py"]).stages
    assert stages["tell_first"].output_fields() == stages["tell_second"].output_fields()


THINGS = '''
from pydantic import BaseModel
from gradmap_pipeline import Artifact, Stage, ModelGraph, hookimpl

class Thing(Artifact):
    number: int = 1

class Make(Stage):
    """Make or take a thing."""
    name = "VERB_thing"
    class Inputs(BaseModel):
        INPUT
    class Outputs(BaseModel):
        thing: Thing
    def run(self, inputs, context):
        return self.Outputs(thing=Thing())

@hookimpl
def gradmap_stages():
    return [Make]
'''


@pytest.mark.parametrize(
    ("other", "wanted", "given"),
    [("b.py", "a Thing (b.py)", "a Thing (a.py)"), ("x/a.py", "a Thing (ROOT/x/a.py)", "a Thing (ROOT/a.py)")],
)
@pytest.mark.parametrize("source", ["", ", from: {thing: make_thing}"])
def test_classes_of_the_same_name_are_told_apart(
    other: str, wanted: str, given: str, source: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    Path("a.py").write_text(THINGS.replace("VERB", "make").replace("INPUT", "model: ModelGraph"))
    Path(other).write_text(THINGS.replace("VERB", "take").replace("INPUT", "thing: Thing"))
    Path("r.yaml").write_text(
        f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: make_thing\n  - {{use: take_thing{source}}}\n"
    )
    result = CliRunner().invoke(app, ["check", "r.yaml", "--plugin", "a.py", "--plugin", other])
    assert result.exit_code == 2
    wanted, given = (text.replace("ROOT", str(tmp_path)) for text in (wanted, given))
    if source:
        assert f"input 'thing' takes {wanted}, but 'make_thing' is {given}" in result.stderr
    else:
        assert f"takes {wanted} as 'thing', but after step 'make_thing' it is {given};" in result.stderr
