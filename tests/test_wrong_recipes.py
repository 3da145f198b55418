"""Every mistake in a recipe: one clear message each, with its place, and exit code 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import RecipeError
from gradmap_pipeline.recipe.recipe import load_recipe

HEAD = "version: 1\nmodel: {path: MODEL}\n"
CALIBRATE = "steps:\n  - use: calibrate\n    with: {dataset: {builtin: heldout}}\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in ["ab", "bc", "cd", "de"]
)

CASES = {
    "unknown key of the recipe": (HEAD + "sed: 3\n" + CALIBRATE, ["3:1: unknown key 'sed'; did you mean 'seed'?"]),
    "unknown key of the model": (
        "version: 1\nmodel: {pth: x}\n" + CALIBRATE,
        ["2:9: unknown key 'pth'; did you mean 'path'?"],
    ),
    "unknown key of a step": (
        HEAD + "steps:\n  - use: calibrate\n    wth: {}\n",
        ["5:5: unknown key 'wth'; did you mean 'with'?"],
    ),
    "unknown option": (
        HEAD + "steps:\n  - use: calibrate\n    with: {dataset: {builtin: heldout}, sample: 3}\n",
        ["5:41: step 'calibrate': option 'sample': unknown key 'sample'; did you mean 'samples'?"],
    ),
    "unknown key of an option": (
        HEAD + "steps:\n  - use: calibrate\n    with: {dataset: {bultin: heldout}}\n",
        ["5:22: step 'calibrate': option 'dataset.bultin': unknown key 'bultin'; did you mean 'builtin'?"],
    ),
    "unknown stage": (HEAD + "steps:\n  - use: calibrat\n", ["4:5: no stage named 'calibrat'; did you mean 'calibrate'?"]),
    "missing input": (
        HEAD + "steps:\n  - use: gradmap_score\n",
        [
            "4:5: step 'gradmap_score' needs an input 'calibration' (CalibrationSet), and no earlier step makes one; "
            "put calibrate before it"
        ],
    ),
    "missing option": (HEAD + "steps:\n  - use: calibrate\n", ["4:5: step 'calibrate': option 'dataset': 'dataset' is missing"]),
    "wrong types": (
        HEAD + "steps:\n  - use: calibrate\n    with:\n      dataset: heldout\n      samples: '128'\n      shuffle: 1\n"
        "      sequence_length: true\n",
        [
            "6:7: step 'calibrate': option 'dataset': found 'heldout', accepted: a mapping",
            "7:7: step 'calibrate': option 'samples': found '128', accepted: a whole number",
            "8:7: step 'calibrate': option 'shuffle': found 1, accepted: true or false",
            "9:7: step 'calibrate': option 'sequence_length': found true, accepted: a whole number",
        ],
    ),
    "out of range": (
        HEAD + "seed: -1\nsteps:\n  - use: prune\n",
        ["3:1: seed: found -1, accepted: at least 0", "5:5: step 'prune': option 'layers': nothing says which layers to remove"],
    ),
    "option out of range": (
        HEAD + "steps:\n  - use: prune\n    with: {ratio: 1.5}\n",
        ["5:12: step 'prune': option 'ratio': found 1.5, accepted: a number above 0 and below 1, such as 0.25"],
    ),
    "share as text": (
        HEAD + "steps:\n  - use: prune\n    with: {ratio: 25%}\n",
        ["5:12: step 'prune': option 'ratio': found '25%', accepted: a number above 0 and below 1, such as 0.25"],
    ),
    "whole number with two bounds": (
        HEAD + "steps:\n  - use: magnitude_score\n    with: {power: 3}\n  - use: prune\n",
        ["5:12: step 'magnitude_score': option 'power': found 3, accepted: a whole number from 1 to 2"],
    ),
    "block that steps share": (
        HEAD + "steps:\n  - use: evaluate\n    id: first\n    with: &text {dataset: {builtin: heldout}, sampels: 8}\n"
        "  - use: evaluate\n    with: *text\n",
        ["6:47: steps 'first' and 'evaluate': option 'sampels': unknown key 'sampels'; did you mean 'samples'?"],
    ),
    "unknown choice": (
        HEAD + "steps:\n  - use: calibrate\n    with: {dataset: {builtin: heldot}}\n",
        [
            "5:22: step 'calibrate': option 'dataset.builtin': found 'heldot', accepted: calibration, heldout; "
            "did you mean 'heldout'?"
        ],
    ),
    "choice or number": (
        HEAD + "steps:\n  - use: evaluate\n    with: {dataset: {builtin: heldout}, samples: some}\n",
        ["5:41: step 'evaluate': option 'samples': found 'some', accepted: a whole number or all"],
    ),
    "number for a name": (
        "version: 1\nmodel: {id: a/b, revision: 1234}\n" + CALIBRATE,
        ["2:18: model.revision: found 1234, accepted: text; put quotes around it"],
    ),
    "missing file": (
        HEAD + "steps:\n  - use: calibrate\n    with: {dataset: {path: no/such.txt}}\n",
        ["5:12: step 'calibrate': option 'dataset': no file or folder 'no/such.txt'; relative paths start at"],
    ),
    "not a model folder": (
        "version: 1\nmodel: {path: .}\n" + CALIBRATE,
        ["2:9: '.' is not a model folder: it has no config.json"],
    ),
    "no such folder": ("version: 1\nmodel: {path: nowhere}\n" + CALIBRATE, ["2:9: no folder 'nowhere'; relative paths start at"]),
    "two models": (
        "version: 1\nmodel: {path: ., id: a/b}\n" + CALIBRATE,
        ["2:1: give exactly one of 'path', 'id' and 'builtin'; found 'path' and 'id'"],
    ),
    "one id twice": (
        HEAD + CALIBRATE + "  - use: calibrate\n    with: {dataset: {builtin: heldout}}\n",
        ["6:5: an earlier step has this id; give this step another, as in `id: calibrate_2`"],
    ),
    "reserved id": (
        HEAD + "steps:\n  - use: prune\n    id: model\n    with: {layers: [1]}\n",
        ["5:5: this name stands for the recipe's model; give this step another"],
    ),
    "id with a dot": (
        HEAD + "steps:\n  - use: prune\n    id: a.b\n    with: {layers: [1]}\n",
        ["5:5: steps.id: found 'a.b', accepted: letters, digits, '-' and '_', starting with a letter"],
    ),
    "unknown inputs and sources": (
        HEAD
        + CALIBRATE
        + "  - use: gradmap_score\n    from: {calibraton: calibrate.calibration}\n  - use: gradmap_score\n    id: two\n"
        + "    from: {calibration: calibrat.calibration, model: calibrate.calibration}\n",
        [
            "7:12: stage 'gradmap_score' has no input 'calibraton'; did you mean 'calibration'?",
            "10:12: no earlier step makes 'calibrat.calibration'; did you mean 'calibrate.calibration'?",
            "10:47: input 'model' takes a ModelGraph, but 'calibrate.calibration' is a CalibrationSet",
        ],
    ),
    "more than was scored": (
        HEAD + CALIBRATE + "  - use: gradmap_score\n    with: {ratio: 0.25}\n  - use: prune\n    with: {ratio: 0.5}\n",
        ["9:12: step 'prune': option 'ratio': removes 2 of 4 layers, but only 1 removals are scored; set the same 'ratio'"],
    ),
    "a list": ("- a\n- b\n", ["1:1: a recipe is a mapping with the keys version, model and steps; found a list"]),
    "a word": ("recipe\n", ["1:1: a recipe is a mapping with the keys version, model and steps; found 'recipe'"]),
    "empty file": ("", ["1:1: the file is empty"]),
    "only a comment": ("# later\n", ["1:1: the file is empty"]),
    "no steps": (HEAD + "steps: []\n", ["3:1: steps: found an empty list; give at least one entry"]),
    "empty step": (HEAD + "steps:\n  -\n", ["4:4: steps: found null, accepted: a mapping"]),
    "missing keys": ("seed: 1\n", ["1:1: 'version' is missing", "1:1: 'model' is missing", "1:1: 'steps' is missing"]),
    "later version": (HEAD.replace("1", "2", 1) + CALIBRATE, ["1:1: version: found 2, accepted: 1"]),
    "tabs": ("version: 1\nmodel:\n\tpath: x\n", ["3:1: a tab indents this line; YAML is indented with spaces"]),
    "duplicate keys": ("version: 1\nversion: 1\n", ["2:1: key 'version' is already given on line 1; keep one of the two"]),
    "alias bomb": (BOMB, [": aliases expand this file to more than 10000 values"]),
    "alias of itself": ("a: &a [*a]\n", [": an alias here stands for something that contains it"]),
    "key that is no text": ("1: 2\n", ["1:1: a key must be text, found '1'; put it in quotes"]),
    "two documents": ("a: 1\n---\nb: 1\n", ["2:1: this is not valid YAML: expected a single document"]),
    "python object": ("a: !!python/object:os.system {}\n", ["1:4: tag 'tag:yaml.org,2002:python/object:os.system' is not allowed"]),
    "wrong tag": ("a: !!int x\n", ["1:4: cannot read 'x' as int"]),
    "broken YAML": ("a: {b: c\nd: e\n", ["2:2: this is not valid YAML: while parsing a flow mapping"]),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["check", "run"])
def test_mistake(case: str, command: str, folder: Path, llama: Path) -> None:
    text, expected = CASES[case]
    (folder / "r.yaml").write_text(text.replace("MODEL", str(llama)))
    result = CliRunner().invoke(app, [command, "r.yaml"])
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == len(expected), result.stderr
    for line, message in zip(sorted(lines), sorted(expected), strict=True):
        assert line.startswith("error: r.yaml:")
        assert message in line
    assert {file.name for file in folder.iterdir()} == {"r.yaml"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "prune.ratio=1.5",
            "--set prune.ratio=1.5: step 'prune': option 'ratio': found 1.5, accepted: a number above 0",
        ),
        ("prun.ratio=0.5", "--set prun.ratio=0.5: no step 'prun' in this recipe; did you mean 'prune'?"),
        ("prune.rato=0.5", "--set prune.rato=0.5: step 'prune': option 'rato': unknown key 'rato'; did you mean 'ratio'?"),
        ("prune=0.5", "--set prune=0.5: names no option of step 'prune'; write prune.OPTION=VALUE"),
        ("ratio", "--set ratio: must look like STEP.OPTION=VALUE, for example prune.ratio=0.3"),
        ("prune.ratio=[", "--set prune.ratio=[:1:2: this is not valid YAML"),
        ("model.path=nowhere", "--set model.path=nowhere: no folder 'nowhere'"),
        (
            "model.builtin=docs-llama",
            "found 'path' and 'builtin'; an option of the file is unset by --set model.OPTION=null",
        ),
        (
            "prune.ratio=0.5",
            "step 'prune': give one of 'ratio', 'layers' and 'target'; found 'ratio' and 'layers'; an option of the file is unset "
            "by --set prune.OPTION=null",
        ),
        ("prune.layers.0=3", "--set prune.layers.0=3: 'layers' is a list; replace the whole of it"),
        ("seed=x", "--set seed=x: seed: found 'x', accepted: a whole number"),
    ],
)
def test_mistake_in_set(override: str, message: str, folder: Path, llama: Path) -> None:
    (folder / "r.yaml").write_text(HEAD.replace("MODEL", str(llama)) + "steps:\n  - use: prune\n    with: {layers: [1]}\n")
    changed = ["--set", override]
    if override.startswith("prune.ratio=") and override != "prune.ratio=0.5":
        changed += ["--set", "prune.layers=null"]
    result = CliRunner().invoke(app, ["check", "r.yaml", *changed])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error:") == 1, result.stderr


@pytest.mark.parametrize(("file", "message"), [("no.yaml", "no.yaml: cannot be read: No such file"), (".", "it is a folder")])
def test_unreadable_file(file: str, message: str, folder: Path) -> None:
    result = CliRunner().invoke(app, ["check", file])
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_not_utf8(folder: Path) -> None:
    (folder / "r.yaml").write_bytes(b"version: \xff\n")
    assert "r.yaml: is not text in UTF-8" in CliRunner().invoke(app, ["check", "r.yaml"]).stderr


@pytest.mark.parametrize(
    ("asked", "advice"),
    [("mine.yml", "did you mean 'mine.yaml'?"), ("mime.yaml", "did you mean 'mine.yaml'?"), ("else.yaml", "name a recipe file")],
)
def test_a_recipe_that_is_not_there(asked: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(RecipeError, match=f"^{asked}: cannot be read: No such file or directory; {re.escape(advice)}$"):
        load_recipe(Path(asked))
