"""No step writes over what a recipe needs, over another step's folder, or over files that it did not make."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model
from typer.testing import CliRunner

from gradmap_pipeline import ExportedFile, OptionError, StageError
from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.atomic_folder import atomic_folder
from gradmap_pipeline.machine.digests import sha256_of
from gradmap_pipeline.recipe.places import find_machine_places
from gradmap_pipeline.stages.targets import check_target, describe_folder, find_foreign_files, new_folder

RECIPE = """\
version: 1
model: {path: model}
steps:
  - use: calibrate
    with: {dataset: {path: texts}, samples: 2, sequence_length: 8}
  - use: export
    with: {to: TARGET, overwrite: true}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> Path:
    folder = tmp_path / "home" / "project"
    (folder / "texts").mkdir(parents=True)
    (folder / "texts" / "a.txt").write_bytes(text.read_bytes())
    make_model(folder / "model")
    (folder / ".gradmap").mkdir()
    (folder / "recipes").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    return folder


def check(target: str, name: str = "r.yaml") -> tuple[int, str]:
    Path(name).write_text(RECIPE.replace("TARGET", target))
    result = CliRunner().invoke(app, ["check", name])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("target", "relation"),
    [
        (".", "holds the store"),
        ("..", "holds the store"),
        ("/", "holds the store"),
        (".gradmap", "is the store"),
        (".gradmap/steps", "lies in the store"),
        ("model", "is the model"),
        ("model/out", "lies in the model"),
        ("texts", "is 'texts', which step 'calibrate' reads"),
        ("texts/out", "lies in 'texts', which step 'calibrate' reads"),
        ("recipes", "holds the recipe"),
        ("link", "is the model"),
        ("link/../link/out", "lies in the model"),
    ],
)
def test_places_that_a_run_needs_are_never_written_over(target: str, relation: str, project: Path) -> None:
    (project / "link").symlink_to("model")
    code, message = check(target, "recipes/r.yaml")
    assert code == 2
    assert f"step 'export' would write {target!r}, which {relation}; choose another folder" in message


def test_a_target_of_the_command_line_is_told_with_its_option(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r.yaml").write_text(RECIPE.replace("TARGET", "out"))
    for target in (".", "model"):
        result = CliRunner().invoke(app, ["check", "r.yaml", "--set", f"export.to={target}"])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: --set export.to={target}: step 'export' would write {target!r}"), result.stderr
    _, message = check(".")
    assert message.startswith("error: r.yaml:7:12: step 'export' would write '.'"), message

    def refuse(*_: object) -> None:
        raise OptionError("to", "no")

    monkeypatch.setattr("gradmap_plugins.export.ExportModel.inspect", refuse)
    result = CliRunner().invoke(app, ["run", "r.yaml", "--set", "export.to=elsewhere", "--quiet"])
    assert (result.exit_code, result.stderr) == (2, "error: step 'export', option 'to' (--set export.to=elsewhere): no\n")


def test_current_folder_is_never_written_over(project: Path, tmp_path: Path) -> None:
    """Wherever the store is."""
    for target in (project, project.parent):
        hits = [place.name for place in find_machine_places(tmp_path / "store", tmp_path / "r.yaml") if place.find_relation(target)]
        assert "the current folder" in hits


def test_home_folder_is_never_written_over(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    text = RECIPE.replace("TARGET", str(tmp_path / "home")).replace("{path: model}", "{builtin: docs-llama}")
    (other / "r.yaml").write_text(text.replace("{path: texts}", "{builtin: heldout}"))
    monkeypatch.chdir(other)
    result = CliRunner().invoke(app, ["check", "r.yaml"])
    assert result.exit_code == 2
    assert "which is the home folder; choose another folder" in result.stderr


def test_folder_beside_them_is_accepted(project: Path) -> None:
    assert check("out") == (0, "")
    assert check("out/deep/model") == (0, "")


@pytest.mark.parametrize(("first", "second"), [("out", "out/inner"), ("out/inner", "out"), ("out", "out"), ("out", "./x/../out")])
def test_targets_of_two_steps_lie_apart(first: str, second: str, project: Path) -> None:
    text = RECIPE.replace("TARGET", first) + f"  - use: export\n    id: again\n    with: {{to: {second}}}\n"
    (project / "r.yaml").write_text(text)
    result = CliRunner().invoke(app, ["check", "r.yaml"])
    assert result.exit_code == 2
    message = f"step 'again' writes {second!r}, which is, holds or lies in what step 'export' writes; choose another folder"
    assert message.replace("./x/../out", str(Path("x/../out"))) in result.stderr


def fill(folder: Path, content: str = "weights") -> dict[str, ExportedFile]:
    (folder / "inner").mkdir()
    (folder / "file").write_text(content)
    (folder / "inner" / "file").write_text("deep")
    return describe_folder(folder)


def export(to: Path, content: str = "weights", *, overwrite: bool = False) -> Mapping[str, Any]:
    with new_folder(to, overwrite) as new:
        files = fill(new.path, content)
        return new.finish({"files": {name: file.model_dump() for name, file in files.items()}}, files)


def test_earlier_export_is_replaced(tmp_path: Path) -> None:
    export(tmp_path / "out")
    assert list(find_foreign_files(tmp_path / "out")) == []
    export(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(
    ("earlier", "target", "relation"),
    [
        ("out", "out/sub", "lies in '{}/out', which is an export"),
        ("out", "out/deep/sub", "lies in '{}/out', which is an export"),
        ("out", "link/sub", "lies in '{}/out', which is an export"),
        ("out/sub", "out", "holds '{}/out/sub', which is another export"),
        ("out/deep/sub", "out", "holds '{}/out/deep/sub', which is another export"),
    ],
)
def test_no_export_spoils_another(earlier: str, target: str, relation: str, edited: bool, project: Path) -> None:
    Path(earlier).parent.mkdir(parents=True, exist_ok=True)
    export(Path(earlier))
    Path("link").symlink_to("out")
    if edited:
        lineage = Path(earlier, "gradmap.json")
        lineage.write_text(lineage.read_text().replace("}", "} "))
        Path(earlier, "model").write_text("edited")
    before = sorted(path for path in Path("out").rglob("*"))
    code, message = check(target)
    assert code == 2
    assert f"step 'export' would write '{target}', which {relation.format(project)}; choose another folder" in message
    with pytest.raises(StageError, match="export; write to another folder"):
        export(Path(target), overwrite=True)
    assert sorted(path for path in Path("out").rglob("*")) == before


def test_an_export_beside_another_is_accepted(project: Path) -> None:
    Path("out").mkdir()
    Path("out/gradmap.json").write_text('{"files": 1}')  # somebody else's
    export(Path("out/one"))
    assert check("out/two")[0] == 0
    assert check("out/one")[0] == 0


@pytest.mark.parametrize("edited", ["file", "inner/file"])
def test_edited_file_of_an_earlier_export_is_not_deleted(edited: str, tmp_path: Path) -> None:
    """Same name and size: the digest tells."""
    out = tmp_path / "out"
    export(out)
    mine = "W" * len((out / edited).read_text())
    (out / edited).write_text(mine)
    check_target(out, overwrite=False)  # names and sizes are as they were
    with pytest.raises(OptionError, match=f"holds '{edited}', which has been changed since it was exported"):
        check_target(out, overwrite=False, reads_files=True)
    with pytest.raises(StageError, match=f"holds '{edited}', which has been changed since it was exported"):
        export(out)
    assert (out / edited).read_text() == mine
    export(out, overwrite=True)
    assert list(find_foreign_files(out)) == []


def test_an_earlier_export_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check before a run and by the step that replaces it, however often both look."""
    out = tmp_path / "out"
    export(out)
    read: list[str] = []

    def note(file: Path) -> str:
        read.append(file.relative_to(out).as_posix() if file.is_relative_to(out) else "")
        return sha256_of(file)

    monkeypatch.setattr("gradmap_pipeline.stages.targets.sha256_of", note)
    check_target(out, overwrite=False, reads_files=True)
    export(out, "new")
    assert sorted(filter(None, read)) == ["file", "inner/file"]
    assert (out / "file").read_text() == "new"


def test_a_file_edited_after_it_was_read_is_read_again(tmp_path: Path) -> None:
    """Its size, and the time that programs can set, are as before."""
    out = tmp_path / "out"
    export(out)
    before = (out / "file").stat()
    with new_folder(out, overwrite=False) as new:
        files = fill(new.path, "new")
        while (out / "file").stat().st_ctime_ns == before.st_ctime_ns:  # some systems count time in ticks
            (out / "file").write_text("WEIGHTS")
        os.utime(out / "file", ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(StageError, match=r"'file' has come into .* or has changed there"):
            new.finish({"files": {}}, files)
    assert (out / "file").read_text() == "WEIGHTS"


def test_file_of_a_folder_with_an_edited_lineage_is_not_deleted(tmp_path: Path) -> None:
    """A lineage that somebody has written, or edited, makes no file ours."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    files = {name: file.model_dump() for name, file in describe_folder(out).items()}
    (out / "gradmap.json").write_text(json.dumps({"files": files}))
    with pytest.raises(OptionError, match=r"holds 'gradmap.json', which is not part of an export"):
        check_target(out, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_that_comes_while_the_export_is_made_stays(overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out)
    (out / "old.txt").write_text("may go")
    if not overwrite:
        (out / "old.txt").unlink()
    with new_folder(out, overwrite) as new:
        files = fill(new.path, "new")
        (out / "inner" / "notes.txt").write_text("mine")
        with pytest.raises(StageError, match=r"'inner/notes.txt' has come into .*; nothing was replaced"):
            new.finish({"files": {}}, files)
    assert (out / "inner" / "notes.txt").read_text() == "mine"
    assert (out / "file").read_text() == "weights"


def test_folder_that_comes_while_the_export_is_made_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, overwrite=False) as new:
        files = fill(new.path)
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(StageError, match=r"'notes.txt' has come into"):
            new.finish({"files": {}}, files)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_what_is_there_and_no_folder_is_refused() -> None:
    with pytest.raises(OptionError, match="'/dev/null' is not a folder; name a folder"):
        check_target(Path("/dev/null"), overwrite=True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a place where nothing can be made is needed")
def test_a_place_where_nothing_can_be_made_ends(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="/proc"), atomic_folder(Path("/proc/out")):
        pass


def test_errors_name_the_folder_as_it_would_have_been_called(tmp_path: Path) -> None:
    with pytest.raises(StageError) as error, new_folder(tmp_path / "out", overwrite=False) as new:
        raise StageError(f"{str(new.path / 'config.json')!r} cannot be loaded")
    assert str(error.value) == f"{str(tmp_path / 'out' / 'config.json')!r} cannot be loaded"


def test_whole_folder_that_is_no_export_goes_only_when_the_recipe_says_so(project: Path) -> None:
    (project / "out").mkdir()
    (project / "out" / "thesis.txt").write_text("mine")
    (project / "r.yaml").write_text(RECIPE.replace("TARGET", "out").replace(", overwrite: true", ""))
    result = CliRunner().invoke(app, ["run", "r.yaml"])
    assert result.exit_code == 2
    assert "folder 'out' holds 'thesis.txt', which is not part of an export" in result.stderr
    assert (project / "out" / "thesis.txt").read_text() == "mine"
    assert not (project / ".gradmap" / "steps").exists()
    assert check("out")[0] == 0
    assert CliRunner().invoke(app, ["run", "r.yaml"]).exit_code == 0
    assert not (project / "out" / "thesis.txt").exists()
