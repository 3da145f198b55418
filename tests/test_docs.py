"""What the docs show works: commands run, recipes plan, plugins load; generated pages are current."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tools.reference import make_api_page, make_pages
from typing_of import check_types

from gradmap_pipeline.api import HOMES
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.plan import make_plan
from gradmap_pipeline.recipe.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TESTED = {"console", "yaml", "python", "toml", "json"}
LONG = {"records.md", "write-a-plugin.md"}
"""Pages whose blocks take most of a minute, and show what other tests hold."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it after cloning; all pages share its results."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.full
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else []) for page in PAGES],
    ids=lambda page: page.name,
)
def test_code_blocks(page: Path, workplace: Path) -> None:
    """In order, each in one of these forms: `$ command` with output, a file that begins with its name, a whole recipe."""
    for language, text in BLOCK.findall(page.read_text()):
        assert language in TESTED | {"text"}, f"{page.name}: a block must say its language"
        named = re.match(r"# ([\w./-]+\.(?:py|yaml|toml))\n", text)
        if named:
            file = workplace / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        if language == "console":
            run_console(text, workplace)
        elif language == "yaml" and text.lstrip("# \n").startswith("version") and not named:
            (workplace / "shown.yaml").write_text(text)
            make_plan(load_recipe(workplace / "shown.yaml"), load_catalog())
        elif language == "python" and not named:
            command = [sys.executable, "-c", text]
            done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def run_console(text: str, folder: Path) -> None:
    """Run each `$ ` line; the lines after it must occur in what it prints (`...` stands for anything)."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        command, _, comment = command.partition("  # exit code ")
        if command.startswith("make "):
            targets = (ROOT / "Makefile").read_text()
            assert all(f"\n{target}:" in targets for target in command.split()[1:]), command
            continue
        if command.startswith(("git clone", "cd ", "pip install")):
            continue
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == int(comment or 0), f"{command}\n{done.stdout}{done.stderr}"
        printed = " ".join((done.stdout + done.stderr).split())
        for line in filter(None, (line.strip() for line in shown.splitlines())):
            for piece in filter(None, (piece.strip() for piece in line.split("..."))):
                assert " ".join(piece.split()) in printed, f"{command}\nshould print {piece!r}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", ["recipe.md", "stages.md", "command-line.md"])
def test_reference_is_current(name: str) -> None:
    assert (ROOT / "docs" / "reference" / name).read_text() == make_pages()[name], "run `make docs`"


def test_the_page_of_the_plugin_api_is_current() -> None:
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == make_api_page(), "run `make docs`"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """Each names a file that is there and, after `#`, a heading in it."""
    for target in links_of(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(file), f"{page.name} links to {target}; {file.name} has {anchors_of(file)}"


def test_the_readme_works_on_a_package_page() -> None:
    """A package index shows the page alone, where a relative link leads nowhere: pages are named instead, and all of them."""
    page = ROOT / "README.md"
    assert links_of(page) == []
    named = set(re.findall(r"`(docs/[^`]+)`", page.read_text()))
    assert all((ROOT / name).exists() for name in named)
    assert named >= {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def links_of(page: Path) -> list[str]:
    """Relative links, and those to headings of the same page, outside blocks of code."""
    return re.findall(r"\]\((?!https?://)([^)\s]+)\)", BLOCK.sub("", page.read_text()))


def anchors_of(page: Path) -> set[str]:
    """Headings as a Git host names them: lower case, hyphens for spaces, no punctuation but those and `_`."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def write_python_blocks(folder: Path) -> list[Path]:
    """Python of all pages, in files; the generated page shows files that are tested where they lie."""
    files = []
    for page in PAGES:
        if page.name != "api.md":
            blocks = [text for language, text in BLOCK.findall(page.read_text()) if language == "python"]
            for number, text in enumerate(blocks):
                named = re.match(r"# ([\w./-]+\.py)\n", text)
                files.append(folder / (named[1] if named else f"{page.stem.replace('-', '_')}_{number}.py"))
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                files[-1].write_text(text)
    return files


def test_python_in_the_docs_imports_public_names_only(tmp_path: Path) -> None:
    files = write_python_blocks(tmp_path)
    assert {"keep_ends.py", "drop_top.py", "influence.py"} <= {file.name for file in files}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradmap"):
                assert node.module in ("gradmap_pipeline", "gradmap_pipeline.testing"), f"{file.name}: {ast.unparse(node)}"
                assert node.module != "gradmap_pipeline" or {alias.name for alias in node.names} <= set(HOMES), file.name


@pytest.mark.full
def test_python_in_the_docs_is_typed(tmp_path: Path) -> None:
    files = [file for file in write_python_blocks(tmp_path) if "gradmap_pipeline" in file.read_text()]
    done = check_types(files, tmp_path)
    assert done.returncode == 0, done.stdout
