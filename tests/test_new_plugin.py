"""`gradmap new-plugin` writes packages that pass their own tests, and refuses the rest with one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app
from gradmap_pipeline.cli.new_plugin import KINDS
from gradmap_pipeline.recipe.catalog import load_catalog

if sys.version_info >= (3, 11):
    import tomllib


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["new-plugin", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def install(folder: Path, name: str, stage: str) -> dict[str, str]:
    """An environment in which Python finds the package as an installed one."""
    information = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (information / "entry_points.txt").write_text(f"[gradmap]\n{stage} = {stage}\n")
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.mark.full
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == "ranking" else pytest.mark.slow) for kind in KINDS])
def test_package_passes_its_own_tests(kind: str, workplace: Path) -> None:
    name, stage = f"gradmap-try-{kind}", f"try_{kind}"
    assert stage in write(name, "--kind", kind)
    environment = install(workplace / name, name, stage)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--strict-markers"]
    done = subprocess.run(command, cwd=workplace / name, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_put_everywhere_and_the_stage_is_found(kind: str, workplace: Path) -> None:
    write("Gradmap.Fold-it", "--kind", kind, "--to", "deep/here")
    folder = workplace / "deep" / "here"
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    assert files == ["README.md", "fold_it.py", "pyproject.toml", "recipe.yaml", "tests/test_recipe.py", "tests/test_stage.py"]
    for file in files:
        text = (folder / file).read_text()
        assert not any(word in text for word in ("stage_name", "StageName", "distribution-name")), file
    catalog = load_catalog([folder / "fold_it.py"])
    assert catalog.stages["fold_it"].__name__ == "FoldIt"
    assert sorted(path.name for path in (workplace / "deep").iterdir()) == ["here"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_entry_point_is_in_the_group_that_the_catalog_reads(workplace: Path) -> None:
    write("gradmap-drop-ends")
    project = tomllib.loads((workplace / "gradmap-drop-ends" / "pyproject.toml").read_text())["project"]
    assert project["name"] == "gradmap-drop-ends"
    assert project["entry-points"] == {"gradmap": {"drop_ends": "drop_ends"}}
    assert project["dependencies"] == ["gradmap-pipeline"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["drop-ends", "--kind", "rankin"], "did you mean 'ranking'?"),
        (["drop-ends", "--kind", "x"], "accepted: correction, evaluation, exporter, quantiser, ranking, transform"),
        (["drop"], "named by two words or more"),
        (["gradmap-drop"], "named by two words or more"),
        (["3-ends"], "named by two words or more"),
        (["drop ends"], "with a letter or digit at both ends"),
        (["drop-ends-"], "with a letter or digit at both ends"),
        (["../drop-ends"], "with a letter or digit at both ends"),
        (["dröp-ends"], "with a letter or digit at both ends"),
        (["a-" + 60 * "b"], "up to 60 letters"),
        (["angular-score"], "there is a stage 'angular_score' already"),
        (["gradmap-typing.extensions"], "there is a module 'typing_extensions' already"),
        (["drop-ends", "--to", "."], "is the current folder"),
        (["drop-ends", "--to", "file"], "is not a folder"),
        (["drop-ends", "--to", "full"], "folder 'full' is not empty"),
        (["drop-ends", "--to", ""], "is empty; name a file or folder"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_message(arguments: list[str], told: str, workplace: Path) -> None:
    (workplace / "file").touch()
    (workplace / "full").mkdir()
    (workplace / "full" / "mine.txt").write_text("mine")
    before = sorted(workplace.rglob("*"))
    result = CliRunner().invoke(app, ["new-plugin", *arguments])
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert sorted(workplace.rglob("*")) == before


def test_empty_folder_is_filled(workplace: Path) -> None:
    (workplace / "mine").mkdir()
    write("drop-ends", "--to", "mine")
    assert (workplace / "mine" / "drop_ends.py").is_file()


def test_failure_on_the_way_leaves_nothing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmap_pipeline.cli.new_plugin.replace_folder", fail)
    result = CliRunner().invoke(app, ["new-plugin", "drop-ends"])
    assert result.exit_code == 2
    assert "'drop-ends' cannot be written: Permission denied" in result.stderr
    assert list(workplace.iterdir()) == []


def fail(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.slow
def test_package_installs_and_is_listed(workplace: Path) -> None:
    """In an environment of its own that sees the libraries of this one."""
    write("gradmap-drop-ends", "--kind", "transform")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "venv"], check=True)
    python = str(workplace / "venv" / "bin" / "python")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    ).stdout.strip()
    here = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    ).stdout.strip()
    (Path(site) / "other.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *options, "-e", "gradmap-drop-ends"], check=True)
    command = [python, "-m", "gradmap_pipeline", "stages"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "drop_ends" in listed
    assert "Drop the layers that the recipe names." in listed
    assert "drop_ends" not in subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=True).stdout
