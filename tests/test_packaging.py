"""What a wheel holds, and what the package says of itself."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

import gradmap_pipeline
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


def test_there_is_one_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert not re.search(r"^version = \"", text, re.MULTILINE)
    assert version("gradmap-pipeline") == gradmap_pipeline.__version__
    assert run("--version") == f"gradmap-pipeline {gradmap_pipeline.__version__}\n"
    assert f"## {gradmap_pipeline.__version__}" in (ROOT / "docs" / "changelog.md").read_text()


def test_pinned_versions_are_allowed_and_the_next_major_ones_are_not() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    allowed = {
        bound.name: bound.specifier for bound in map(Requirement, re.findall(r'^    "([a-z][\w-]*>=[^"]*)",$', text, re.MULTILINE))
    }
    pinned = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for pin in pinned:
        (exact,) = pin.specifier
        name = pin.name.lower().replace("_", "-")
        assert exact.version in allowed.get(name, SpecifierSet()), pin
    assert not {"6.0.0", "6.1"} & set(allowed["transformers"].filter(["6.0.0", "6.1"]))
    assert "3.0" not in allowed["torch"]
    assert "2.13.0" in allowed["torch"]


def test_ci_runs_what_there_is() -> None:
    """Targets that the Makefile has, from the oldest Python that is allowed."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert jobs["pinned"]["strategy"]["matrix"]["python"][0] == oldest[1]
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"[\w-]+:", line)}
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    wanted = {word for command in commands if command.startswith("make ") for word in command.split()[1:] if "=" not in word}
    assert {"test", "test-quick", "lint"} <= wanted <= targets
    assert jobs["gpu"]["runs-on"] == ["self-hosted", "gpu"]
    assert jobs["gpu"]["if"]


@pytest.mark.full
def test_quick_tests_leave_out_what_is_full_and_all_others_do_not() -> None:
    """Ten architectures stay; what `make test` runs has all of them."""
    makefile = (ROOT / "Makefile").read_text()
    assert "-m 'not slow and not full'" in makefile[makefile.index("test-quick:") : makefile.index("\ntest:")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-n0",
        "tests/test_every_architecture.py",
        "-k",
        "test_architecture",
    ]
    counts = []
    for mark in ("not slow and not full", "not slow"):
        done = subprocess.run([*command, "-m", mark], cwd=ROOT, capture_output=True, text=True, check=True)
        counts.append(done.stdout.count("::test_architecture["))
    assert counts[0] == 10
    assert counts[1] >= 100


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
    assert not names & {"gradmap_pipeline/reference.py", "gradmap_pipeline/builtin/train.py"}
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
