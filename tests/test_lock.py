"""Lock files, and exports that are made again: the same bytes elsewhere, and whatever is another is named."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_text
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.data.sources import DatasetSource
from gradmap_pipeline.errors import CommandError
from gradmap_pipeline.machine.digests import sha256_of
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.plan import make_plan
from gradmap_pipeline.recipe.recipe import load_recipe
from gradmap_pipeline.run import provenance
from gradmap_pipeline.run.lock_file import read_lock
from gradmap_pipeline.run.revisions import Revision, find_hub_data, pin_revisions
from gradmap_pipeline.text import without_places

_TEXT = {"dataset": {"path": "text.txt"}, "samples": 4, "sequence_length": 32}
_KEEP = '''
from pydantic import BaseModel
from gradmap_pipeline import ModelGraph, Stage, hookimpl

class Keep(Stage):
    """Keep everything."""
    name = "keep_all"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        return self.Outputs(model=inputs.model)

@hookimpl
def gradmap_stages():
    return [Keep]
'''
_RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"path": "model"},
    "steps": [
        {"use": "calibrate", "with": _TEXT},
        {"use": "magnitude_score", "with": {"layers": 1}},
        {"use": "prune", "with": {"layers": 1}},
        {"use": "keep_all"},
        {"use": "project_compensate"},
        {"use": "evaluate", "with": _TEXT},
        {"use": "export", "with": {"to": "out/x"}},
        {"use": "export", "id": "export_dense", "from": {"model": "model.model"}, "with": {"to": "out/dense"}},
        {"use": "evaluate", "id": "after", "with": _TEXT},
    ],
}


def gradmap(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--plugin", "keep.py"])


def make_materials(folder: Path) -> Path:
    """All that the recipe reads."""
    make_model(folder / "model")
    make_text(folder / "text.txt")
    (folder / "keep.py").write_text(_KEEP)
    (folder / "r.yaml").write_text("# a comment\n" + json.dumps(_RECIPE))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the recipe is locked and has run."""
    folder = make_materials(tmp_path_factory.mktemp("made"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = gradmap("lock", "r.yaml")
        assert result.exit_code == 0, result.output
        assert f"wrote r.yaml.lock: model, 9 steps, Python {platform.python_version()}" in result.stdout
        result = gradmap("run", "r.yaml", "--locked")
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another user's folder with the recipe, its lock and what it reads, and an empty store."""
    for name in ("model", "text.txt", "keep.py", "r.yaml", "r.yaml.lock"):
        (shutil.copytree if name == "model" else shutil.copy)(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USER", "somebody")
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "gradmap.json"]
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


def test_locked_recipe_gives_the_same_bytes_elsewhere(made: Path, copy: Path) -> None:
    (copy / "r.yaml").write_text("# another comment\n" + json.dumps({**_RECIPE, "description": "mine"}))
    result = gradmap("run", "r.yaml", "--locked", "--store", "kept")
    assert result.exit_code == 0, result.output
    assert "calibrate: done (from the store)" not in result.stdout
    assert digests(copy / "out" / "x") == digests(made / "out" / "x")
    assert {"model.safetensors", "README.md", "report.html", "config.json"} <= digests(made / "out" / "x").keys()
    assert "the processor is" not in result.stdout


def test_lock_written_again_is_the_same(folder: Path) -> None:
    before = (folder / "r.yaml.lock").read_text()
    assert str(folder) not in before
    assert gradmap("lock", "r.yaml", "--store", "another").exit_code == 0
    assert (folder / "r.yaml.lock").read_text() == before


def change_data(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "text.txt").write_text((folder / "text.txt").read_text() + "!")
    return []


def change_model(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    shutil.rmtree(folder / "model")
    make_model(folder / "model", seed=1)
    return []


def change_plugin(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "keep.py").write_text(_KEEP.replace("everything", "all"))
    return []


def change_recipe(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    recipe = json.loads(json.dumps(_RECIPE))
    recipe["steps"][7]["from"] = {"model": "prune.model"}
    recipe["steps"][8]["id"] = "later"
    (folder / "r.yaml").write_text(json.dumps(recipe))
    return []


def change_library(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr("gradmap_pipeline.run.keys.version", lambda name: "0.9" if name == "tokenizers" else version(name))
    return []


def change_python(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(platform, "python_version", lambda: "3.99.0")
    return []


def change_plugin_version(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(provenance, "__version__", "9.9")
    return []


def options(*given: str) -> Callable[[Path, pytest.MonkeyPatch], list[str]]:
    return lambda folder, patch: list(given)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_data, ["step 'calibrate': option 'dataset': 'files' holds other content (["]),
        (change_model, ["the model: 'sha256' holds other content ("]),
        (change_plugin, ["step 'keep_all': the code of its plugin, 'keep.py', is another ("]),
        (
            change_plugin_version,
            [f"step 'prune': the plugin is 'gradmap-pipeline 9.9', locked: 'gradmap-pipeline {version('gradmap-pipeline')}'"],
        ),
        (change_library, [f"library 'tokenizers' is 0.9, locked: {version('tokenizers')}"]),
        (change_python, [f"Python is 3.99.0, locked: {platform.python_version()}"]),
        (
            change_recipe,
            [
                "step 'later' is not locked",
                "step 'after' is locked, and the recipe has none of that id",
                "step 'export_dense': input 'model' is prune.model, locked: model.model",
            ],
        ),
        (options("--set", "prune.layers=[1]"), ["step 'prune': option 'layers' is [1], locked: 1"]),
        (options("--set", "seed=3"), ["the seed is 3, locked: 0"]),
        (options("--set", "model.dtype=float16"), ["the model: 'dtype' is float16, locked: not given"]),
        (options("--dtype", "bfloat16"), ["the compute type is bfloat16, locked: float32"]),
        (options("--threads", "3"), ["threads are 3, locked: 1"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_whatever_is_another_is_refused_by_name(
    change: Callable[[Path, pytest.MonkeyPatch], list[str]], told: list[str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = change(copy, monkeypatch)
    result = gradmap("run", "r.yaml", "--locked", *given)
    assert result.exit_code == 2
    for line in told:
        assert f"error: r.yaml.lock: {line}" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == ("error: r.yaml.lock: nothing was run; make it as it was, or lock the recipe again with `gradmap lock r.yaml`")
    assert not (copy / "out").exists()
    assert not list((copy / ".gradmap").glob("steps/*"))


def test_another_processor_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = json.loads((copy / "r.yaml.lock").read_text())
    (copy / "r.yaml.lock").write_text(json.dumps({**lock, "processor": "abacus"}))
    (copy / "short.yaml").write_text(json.dumps({**_RECIPE, "steps": [{"use": "prune", "with": {"layers": [1]}}]}))
    assert gradmap("lock", "short.yaml").exit_code == 0
    text = (copy / "short.yaml.lock").read_text()
    (copy / "short.yaml.lock").write_text(text.replace(json.loads(text)["processor"], "abacus"))
    result = gradmap("run", "short.yaml", "--locked")
    assert result.exit_code == 0
    assert "and the lock was made on 'abacus': floating-point sums may come out otherwise" in result.stdout


def test_threads_of_the_lock_are_used(copy: Path) -> None:
    import torch

    (copy / "short.yaml").write_text(json.dumps({**_RECIPE, "steps": [{"use": "prune", "with": {"layers": [1]}}]}))
    before = torch.get_num_threads()
    try:
        assert gradmap("lock", "short.yaml", "--threads", "2").exit_code == 0
        torch.set_num_threads(1)
        assert ", 2 threads, " in gradmap("run", "short.yaml", "--locked").stdout
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no 'r.yaml.lock'; write it with `gradmap lock r.yaml`"),
        ("not JSON", "'r.yaml.lock' cannot be used: it is no lock file, as it is not JSON; move it away"),
        ("[1]", "'r.yaml.lock' cannot be used: it is no lock file of this version (the whole: "),
        ('{"version": 2}', "'r.yaml.lock' cannot be used: it is no lock file of this version (version: "),
    ],
)
def test_lock_that_is_none_is_refused(copy: Path, content: str | None, told: str) -> None:
    (copy / "r.yaml.lock").unlink()
    if content is not None:
        (copy / "r.yaml.lock").write_text(content)
        again = gradmap("lock", "r.yaml")
        assert again.exit_code == 2
        assert "'r.yaml.lock' is in the way: it is no lock file" in again.stderr
        assert (copy / "r.yaml.lock").read_text() == content
    result = gradmap("run", "r.yaml", "--locked")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert told in result.stderr


def test_export_says_how_it_is_made(folder: Path) -> None:
    """As far as this export, without what other exports are for, and without places of this machine."""
    text = (folder / "out" / "x" / "gradmap.json").read_text()
    lineage = json.loads(text)
    assert [step["use"] for step in lineage["recipe"]["steps"]] == [step["use"] for step in _RECIPE["steps"][:7]]
    assert [step["id"] for step in lineage["provenance"]["steps"]][-1] == "export"
    assert str(folder) not in text
    assert str(Path.home()) not in text
    dense = json.loads((folder / "out" / "dense" / "gradmap.json").read_text())
    assert [step["use"] for step in dense["recipe"]["steps"]][-1] == "export"
    assert "out/x" not in json.dumps(dense["recipe"])


def test_export_is_made_again(made: Path, copy: Path) -> None:
    result = gradmap("run", made / "out" / "x" / "gradmap.json")
    assert result.exit_code == 0, result.output
    assert f"the same bytes as {made}/out/x: " in result.stdout
    assert digests(copy / "out" / "x-again") == digests(made / "out" / "x")
    (copy / "text.txt").write_text((copy / "text.txt").read_text()[1000:])
    result = gradmap("run", made / "out" / "x" / "gradmap.json", "--set", "export.to=other")
    assert result.exit_code == 6
    assert f"differs from {made}/out/x in README.md, model.safetensors, report.html; what is another this time:" in result.stderr
    assert "step 'calibrate': option 'dataset': 'files' holds other content" in result.stderr
    assert (copy / "other" / "model.safetensors").exists()
    assert gradmap("check", made / "out" / "x" / "gradmap.json", "--set", "export.to=third").exit_code == 0
    refused = gradmap("lock", made / "out" / "x" / "gradmap.json")
    assert refused.exit_code == 2
    assert "says itself what it was made with; gradmap run --locked" in refused.stderr
    locked = gradmap("run", made / "out" / "x" / "gradmap.json", "--locked")
    assert locked.exit_code == 2
    assert "nothing was run; make it as it was, or run it without --locked to see what comes out" in locked.stderr


def test_export_whose_data_lie_elsewhere(made: Path, copy: Path) -> None:
    (copy / "text.txt").rename(copy / "words.txt")
    result = gradmap("run", made / "out" / "x" / "gradmap.json")
    assert result.exit_code == 2
    lines = (made / "out" / "x" / "gradmap.json").read_text().splitlines()
    number = next(number for number, line in enumerate(lines, 1) if '"dataset": {' in line)
    assert f"gradmap.json:{number}:" in result.stderr
    assert "no file or folder 'text.txt'" in result.stderr
    assert "are named with --set, as in --set model.path=FOLDER or --set calibrate.dataset.path=FILE" in result.stderr
    named = [f"--set={step}.dataset.path=words.txt" for step in ("calibrate", "evaluate")]
    result = gradmap("run", made / "out" / "x" / "gradmap.json", *named)
    differing = "differs from" in result.stderr
    assert differing == (result.exit_code == 6)
    assert sha256_of(copy / "out" / "x-again" / "model.safetensors") == digests(made / "out" / "x")["model.safetensors"]


def test_export_of_an_earlier_version_is_refused(copy: Path, made: Path) -> None:
    from gradmap_pipeline.machine.digests import sha256_of_value

    shutil.copytree(made / "out" / "x", copy / "old")
    lineage = json.loads((copy / "old" / "gradmap.json").read_text())
    (copy / "old" / "gradmap.json").write_text(json.dumps({**lineage, "seed": 1}))
    result = gradmap("run", "old/gradmap.json")
    assert (result.exit_code, "is damaged: it is not what was written" in result.stderr) == (4, True)
    content = {key: value for key, value in lineage.items() if key not in ("sha256", "recipe")}
    (copy / "old" / "gradmap.json").write_text(json.dumps({**content, "sha256": sha256_of_value(content)}))
    result = gradmap("run", "old/gradmap.json")
    assert result.exit_code == 2
    assert "does not say how it is made: an earlier version wrote it; run its recipe" in result.stderr


def test_places_of_this_machine_are_cut(tmp_path: Path) -> None:
    value = {"a": [str(tmp_path), str(tmp_path / "new"), "/no_think", "out/x", 3], "b": f"{tmp_path}\nx"}
    assert without_places(value) == {"a": [tmp_path.name, "new", "/no_think", "out/x", 3], "b": f"{tmp_path}\nx"}


_COMMIT = "a" * 40


def test_commits_of_the_hub_are_pinned(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe names by a branch is read at the commit of the lock; what it names otherwise since then is refused."""

    class Hub:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            assert (name, revision) == ("owner/words", "main")
            return type("Info", (), {"sha": _COMMIT})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    mix = {"mix": [{"path": "text.txt"}, {"id": "owner/words", "revision": "main"}]}
    steps = [{"use": "calibrate", "with": {"dataset": mix, "samples": 4, "sequence_length": 32}}]
    (copy / "h.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    result = gradmap("lock", "h.yaml")
    assert result.exit_code == 0, result.output
    lock = json.loads((copy / "h.yaml.lock").read_text())
    assert lock["revisions"] == [{"place": "calibrate.dataset.mix.1", "asked": "main", "commit": _COMMIT}]
    read: list[str | None] = []
    monkeypatch.setattr(DatasetSource, "_stream_rows", lambda self, seed: read.append(self.revision) or iter(()))
    assert gradmap("run", "h.yaml", "--locked").exit_code == 4  # no text
    assert read == [_COMMIT]
    text = (copy / "h.yaml").read_text()
    (copy / "h.yaml").write_text(text.replace('"main"', '"v2"'))
    result = gradmap("run", "h.yaml", "--locked")
    assert result.exit_code == 2
    assert "'revision' is v2, locked: aaaaaaaaaaaa" in result.stderr


def test_hub_that_does_not_answer(copy: Path) -> None:
    steps = [{"use": "calibrate", "with": {"dataset": {"id": "owner/words"}, "samples": 4, "sequence_length": 32}}]
    (copy / "h.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    result = gradmap("lock", "h.yaml")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "calibrate.dataset: the commit of data set 'owner/words' cannot be learned from the Hugging Face hub" in result.stderr
    assert "name a commit as its 'revision'" in result.stderr
    assert not (copy / "h.yaml.lock").exists()


def test_model_of_the_hub_is_pinned(copy: Path) -> None:
    (copy / "h.yaml").write_text(json.dumps({**_RECIPE, "steps": [{"use": "prune", "with": {"layers": [1]}}]}))
    plan = make_plan(load_recipe(copy / "h.yaml", ["model={id: owner/name, revision: main}"]), load_catalog())
    pinned = pin_revisions(plan, [Revision(place="model", asked="main", commit=_COMMIT)])
    assert pinned.model.revision == _COMMIT
    assert pin_revisions(plan, [Revision(place="model", asked="v1", commit=_COMMIT)]).model.revision == "main"
    assert list(find_hub_data(plan.steps[0].stage, "prune")) == []


def test_advice_names_the_recipe_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(CommandError, match=f"write it with `gradmap lock {re.escape(str(tmp_path / 'kept' / 'r.yaml'))}`"):
        read_lock(tmp_path / "kept" / "r.yaml.lock")
