"""Recipes that are wrong in several places, deep, huge or oddly written: every problem at once, each with its place."""

from __future__ import annotations

import codecs
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import RecipeError
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.plan import Plan, make_plan
from gradmap_pipeline.recipe.recipe import load_recipe
from gradmap_pipeline.recipe.yaml_positions import load_yaml

HEAD = "version: 1\nmodel: {builtin: docs-llama}\n"
EVALUATE = "  - use: evaluate\n    with: {dataset: {builtin: heldout}}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(text: str | bytes, *options: str) -> Result:
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.monotonic()
    result = CliRunner().invoke(app, ["check", "r.yaml", *options])
    assert time.monotonic() - started < 5
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def problems(text: str | bytes, *options: str) -> list[str]:
    result = check(text, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return [line.removeprefix("error: ") for line in result.stderr.splitlines()]


def plan(text: str) -> Plan:
    Path("r.yaml").write_text(text)
    return make_plan(load_recipe(Path("r.yaml")), load_catalog())


def test_all_problems_are_told_at_once_in_order_of_place(folder: Path) -> None:
    lines = problems(
        "version: 1\nsed: 3\nmodel: docs-llama\nsteps:\n"
        "  - use: mean_bias\n    with: {ridge: 0.1}\n"
        "  - use: calibrate\n    wth: {}\n"
        "  - use: evaluate\n    with: {dataset: heldout, samples: '3'}\n"
        "  - use: export\n    with: {to: ''}\n",
        *("--set", "seed=x", "--set", "prun.ratio=1"),
    )
    assert [line.split(": ", 1)[0] for line in lines] == [
        *("r.yaml:2:1", "r.yaml:3:1", "r.yaml:5:5", "r.yaml:6:12", "r.yaml:8:5", "r.yaml:10:12", "r.yaml:10:30", "r.yaml:12:12"),
        *("--set seed=x", "--set prun.ratio=1"),
    ]
    assert "unknown key 'ridge'; accepted: none" in lines[3]


def test_a_problem_is_told_once_and_not_again_by_its_consequences(folder: Path) -> None:
    text = (
        HEAD
        + "steps:\n  - use: calibrat\n  - use: gradmap_score\n  - use: prune\n"
        + "  - use: evaluate\n    from: {model: calibrat.model}\n"
    )
    lines = problems(text)
    assert [line.split(": ", 1)[0] for line in lines] == ["r.yaml:4:5", "r.yaml:7:5"]
    assert "'dataset' is missing" in lines[1]


def test_a_model_that_cannot_be_read_does_not_hide_the_steps(folder: Path) -> None:
    lines = problems("version: 1\nmodel: {path: nowhere}\nsteps:\n  - use: prune\n    with: {ratio: 2}\n")
    assert len(lines) == 2
    assert "no folder 'nowhere'" in lines[0]
    assert "option 'ratio': found 2" in lines[1]


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("model: docs-llama", "write builtin:docs-llama"),
        ("model: some/folder", "write './some/folder' or {id: some/folder}"),
        ("model: gpt2", "write {id: gpt2}"),
        (
            "model: ~",
            "found null, accepted: owner/name of a hub, a path that starts with './', '/' or '~', builtin:docs-llama, or a",
        ),
        ("model: 5", "found 5, accepted: owner/name of a hub"),
        ("model: [gpt2]", 'found ["gpt2"], accepted: owner/name of a hub'),
        ("model: {id: a/b/c}", "r.yaml:2:9: "),
        ("model: {path: ~}", "found none"),
    ],
)
def test_a_model_as_text_says_what_to_write(line: str, advice: str, folder: Path) -> None:
    (folder / "some" / "folder").mkdir(parents=True)
    (lines,) = problems(f"version: 1\n{line}\nsteps:\n{EVALUATE}")
    assert advice in lines


def test_merge_keys(folder: Path) -> None:
    made = plan(
        HEAD
        + "steps:\n  - use: evaluate\n    with: &a {dataset: {builtin: heldout}, samples: 4, sequence_length: 32}\n"
        + "  - use: evaluate\n    id: b\n    with: &b {samples: 6, <<: *a, packing: none}\n"
        + "  - use: evaluate\n    id: c\n    with: {<<: [*b, *a], sequence_length: 16}\n"
    )
    options = [(step.stage.samples, step.stage.sequence_length, step.stage.packing) for step in made.steps]  # type: ignore[attr-defined]
    assert options == [(4, 32, "documents"), (6, 32, "none"), (6, 16, "none")]


MERGE_BOMB = "".join(f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 40)}]}}\n" for old, new in ["ab", "bc", "cd", "de"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a {x: 1, y: bad}\nb: {<<: *a, x: 2}\n", None),
        ("b: {<<: *c}\n", "r:1:9: this is not valid YAML: found undefined alias 'c'"),
        ("b: {<<: 3}\n", "r:1:9: '<<' merges mappings, found '3'; name one by its anchor, as in `<<: *name`"),
        ("a: &a [1]\nb: {<<: [*a]}\n", "r:1:4: '<<' merges mappings, found a list"),
        ("a: &a {<<: *a}\n", "r:1:4: an alias here stands for something that contains it"),
        ("a: &a {}\nb: {<<: *a, <<: *a}\n", "r:2:13: key '<<' is already given on line 2"),
        ("b: {'<<': {x: 1}}\n", None),
        ("a: &a {x: 1}\n" + MERGE_BOMB, "more than 10000"),
    ],
)  # fmt: skip
def test_merge_keys_at_their_edges(text: str, message: str | None) -> None:
    if message is None:
        assert load_yaml(text, "r").data["b"] in ({"x": 2, "y": "bad"}, {"<<": {"x": 1}})
        return
    with pytest.raises(RecipeError) as caught:
        load_yaml(text, "r")
    assert message in str(caught.value)


def test_a_merged_value_is_placed_where_it_is_written(folder: Path) -> None:
    text = HEAD + "steps:\n  - use: evaluate\n    with: &e {dataset: {builtin: heldout}, samples: x}\n"
    lines = problems(text + "  - use: evaluate\n    id: two\n    with:\n      <<: *e\n      packing: some\n")
    assert [line.split(": step")[0] for line in lines] == ["r.yaml:5:44", "r.yaml:10:7"]
    assert lines[0].startswith("r.yaml:5:44: steps 'evaluate' and 'two': option 'samples': found 'x'")


def test_home_folder_in_every_path(folder: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "m").symlink_to(llama)
    (folder / "t.txt").symlink_to(text)
    (folder / "tasks").mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    Path("r.yaml").write_text(
        "version: 1\nmodel: {path: ~/m}\nsteps:\n  - use: calibrate\n    with: {dataset: {path: ~/t.txt}}\n"
        "    run: {python: ~/python}\n  - use: evaluate_lm_eval\n    with: {tasks: [x], task_folder: ~/tasks}\n"
        "  - use: export\n    with: {to: ~/out}\n"
    )
    made = make_plan(load_recipe(Path("r.yaml"), ["export.to=~/other"]), load_catalog())
    assert made.model.path == folder / "m"
    calibrate, tasks, export = made.steps
    assert calibrate.stage.dataset.path == folder / "t.txt"  # type: ignore[attr-defined]
    assert calibrate.python == folder / "python"
    assert tasks.stage.task_folder.root == folder / "tasks"  # type: ignore[attr-defined]
    assert export.stage.writes() == (folder / "other",)


@pytest.mark.parametrize("path", ["", "a\\0b", "x" * 300, "y/" * 3000])
def test_paths_that_no_file_can_have(path: str, folder: Path) -> None:
    steps = f'steps:\n  - use: calibrate\n    with: {{dataset: {{path: "{path}"}}}}\n  - use: export\n    with: {{to: "{path}"}}\n'
    lines = problems(f'version: 1\nmodel: {{path: "{path}"}}\n{steps}')
    assert len(lines) == 3, lines
    assert all("path" in line for line in lines)
    assert max(map(len, lines)) < 250


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999", "9223372036854775808", "1" + "0" * 40, "1" + "0" * 5000])
def test_numbers_that_nothing_can_work_with(number: str, folder: Path) -> None:
    options = "samples: N, sequence_length: N, max_perplexity: N, max_perplexity_ratio: N".replace("N", number)
    text = f"{HEAD}seed: {number}\nsteps:\n  - use: evaluate\n    with: {{dataset: {{builtin: heldout}}, {options}}}\n"
    lines = problems(text)
    assert len(lines) == (1 if len(number) > 4000 or number.startswith("1" + "0" * 39) else 5), lines
    assert all("accepted: a" in line or "is too large a number" in line or "cannot read '1000" in line for line in lines)


def test_largest_seed(folder: Path) -> None:
    assert plan(f"{HEAD}seed: {2**63 - 1}\nsteps:\n{EVALUATE}").seed == 2**63 - 1


NESTED = {
    "lists": "a: " + "[" * 1000 + "]" * 1000,
    "mappings": "{a: " * 1000 + "1" + "}" * 1000,
    "block lists": "- " * 1000 + "x",
    "block mappings": "".join(" " * depth + "a:\n" for depth in range(300)),
    "open": "[" * 100_000,
    "aliases": "a: &a0 [x]\n" + "".join(f"k{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 120)),
    "keys": "? " * 1000 + "x",
}


@pytest.mark.parametrize("case", NESTED)
def test_deep_nesting_is_refused(case: str, folder: Path) -> None:
    (lines,) = problems(NESTED[case])
    assert "values are nested more than 64 deep" in lines


@pytest.mark.parametrize("options", [("--set", "evaluate.samples=" + "[" * 1000), ("--set", "model=" + "{a: " * 1000)])
def test_deep_nesting_on_the_command_line(options: tuple[str, str], folder: Path) -> None:
    (lines,) = problems(f"{HEAD}steps:\n{EVALUATE}", *options)
    assert "values are nested more than 64 deep" in lines
    result = CliRunner().invoke(app, ["compare", "r.yaml", "--grid", "evaluate.samples=" + "[" * 1000])
    assert (result.exit_code, "nested more than 64 deep" in result.stderr) == (2, True)


ENCODED = {
    "utf-16": ((HEAD + "steps:\n" + EVALUATE).encode("utf-16"), "is not text in UTF-8 but in UTF-16; save it as UTF-8"),
    "latin-1": (b"version: 1\nmodel: {path: caf\xe9}\n", "is not text in UTF-8: byte 0xE9 on line 2; save it as UTF-8"),
    "control character": (b"version: 1\na: \x07\n", ":2:4: the character U+0007 is not allowed in YAML; remove it"),
    "NUL": (b"version: 1\n\0\n", ":2:1: the character U+0000 is not allowed in YAML"),
    "surrogate": (b'version: "\\ud800"\n', ":1:10: half of a surrogate pair is not a character"),
    "no such character": (b'version: "\\UFFFFFFFF"\n', "this is not valid YAML"),
}


@pytest.mark.parametrize("case", ENCODED)
def test_encodings(case: str, folder: Path) -> None:
    content, message = ENCODED[case]
    (lines,) = problems(content)
    assert message in lines


@pytest.mark.parametrize("change", [lambda b: codecs.BOM_UTF8 + b, lambda b: b.replace(b"\n", b"\r\n")])
def test_byte_order_mark_and_windows_lines_are_read(change: object, folder: Path) -> None:
    result = check(change((HEAD + "steps:\n" + EVALUATE).encode()))  # type: ignore[operator]
    assert result.exit_code == 0, result.stderr


def test_a_huge_file_is_refused_quickly(folder: Path) -> None:
    with Path("r.yaml").open("wb") as file:
        file.truncate(100 << 20)
    started = time.monotonic()
    result = CliRunner().invoke(app, ["check", "r.yaml"])
    assert time.monotonic() - started < 1
    assert (result.exit_code, "r.yaml: is not a recipe: it holds more than 1 MiB" in result.stderr) == (2, True)


@pytest.mark.parametrize("line", ["- x\n", "# comment\n", "a" * 60 + ": [1, 2, 3, 4]\n", "\n", "x", "'''", "- - - x\n", "&a *a "])
def test_the_largest_file_that_is_read_takes_no_time(line: str, folder: Path) -> None:
    lines = problems(line * ((1 << 20) // len(line)))
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("", "must look like STEP.OPTION=VALUE"),
        ("=", "must look like STEP.OPTION=VALUE"),
        ("a..b=1", "must look like STEP.OPTION=VALUE"),
        ("evaluate.=1", "must look like STEP.OPTION=VALUE"),
        ("version=2", "no step 'version' in this recipe"),
        ("steps=[]", "no step 'steps' in this recipe"),
        ("seed.x=1", "'seed' is not a mapping; replace the whole of it"),
        ("evaluate.samples.x=1", "'samples' is not a mapping; replace the whole of it"),
        ("model=null", "model: found null, accepted: owner/name of a hub"),
        ("model.x.y=1", "unknown key 'x'"),
        ("evaluate.samples=# none", "no value is given"),
        ("evaluate.samples=!!python/name:os.system x", "tag 'tag:yaml.org,2002:python/name:os.system' is not allowed"),
        ("evaluate.samples=*a", "found undefined alias"),
        ("evaluate.samples=\x00", "the character U+0000 is not allowed"),
        ("evaluate.samples=\udce9", "the character U+DCE9 is not allowed"),
        ("evaluate.samples=1: 2", "a key must be text"),
    ],
)
def test_odd_forms_of_set(override: str, message: str, folder: Path) -> None:
    text = HEAD + "seed: 1\nsteps:\n  - use: evaluate\n    with: {dataset: {builtin: heldout}, samples: 3}\n"
    (lines,) = problems(text, "--set", override)
    assert message in lines


def test_a_step_that_takes_from_itself(folder: Path) -> None:
    (lines,) = problems(HEAD + "steps:\n  - use: prune\n    with: {layers: [1]}\n    from: {model: prune.model}\n")
    assert "no earlier step makes 'prune.model'" in lines


def test_check_writes_nothing_but_that_all_was_well(folder: Path) -> None:
    check(HEAD + "steps:\n" + EVALUATE)
    files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    units = [".gradmap/units/check", ".gradmap/units/structure"]
    assert [name.partition("-")[0] for name in files] == [".gradmap/.gitignore", *units, "r.yaml"]
    check(HEAD + "steps:\n  - use: evaluate\n    with: {samples: x}\n", "--store", "other")
    assert not (folder / "other").exists()
