"""What a wheel holds, and what the package says of itself."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmap_pipeline.cli import app

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_recipes_are_listed_with_their_first_comment() -> None:
    lines = run("recipes").splitlines()
    assert [line.split()[0] for line in lines] == [file.stem for file in RECIPES]
    for line, file in zip(lines, RECIPES, strict=True):
        assert line.split(maxsplit=1)[1] == file.read_text().splitlines()[0].removeprefix("# ")


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_recipe_is_printed_as_it_is(name: str) -> None:
    assert run("recipes", name) == (ROOT / "recipes" / "quickstart.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "told"), [("quickstat", "did you mean 'quickstart'?"), ("zzz", "accepted: angular, "), ("../setup", "accepted: ")]
)
def test_unknown_recipe_is_refused(name: str, told: str) -> None:
    result = CliRunner().invoke(app, ["recipes", name])
    assert result.exit_code == 2
    assert f"no recipe named {name!r} ships; {told}" in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
def test_wheel_has_recipes_and_templates_and_works_from_elsewhere(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left in the repository; its modules come before those of this one."""
    for name in ("gradmap_pipeline", "plugins", "recipes", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path)], check=True)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", "."], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"gradmap_recipes/{file.name}" for file in RECIPES} <= names
    templates = ROOT / "gradmap_pipeline" / "template"
    files = [file for file in templates.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert {f"gradmap_pipeline/template/{file.relative_to(templates).as_posix()}" for file in files} <= names

    def start(*arguments: str) -> str:
        code = (
            f"import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]; "
            f"sys.path.insert(0, {str(tmp_path / 'site')!r}); import gradmap_pipeline, gradmap_recipes; "
            "assert all('site' in m.__file__ and 'site-packages' not in m.__file__ for m in (gradmap_pipeline, gradmap_recipes)); "
            "from gradmap_pipeline.cli import main; main()"
        )
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert start("recipes", "quickstart") == (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert "wrote drop-ends" in start("new-plugin", "drop-ends", "--kind", "correction")
    assert (tmp_path / "drop-ends" / "drop_ends.py").is_file()
