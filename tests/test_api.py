"""The public names: each is described, and occurs in an example that runs; `docs/api.md` shows both."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

from gradmap_pipeline.api import GROUPS, HOMES

EXAMPLES = Path(__file__).parent / "api_examples"
PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")


def example_of(title: str) -> Path:
    return EXAMPLES / f"{title.lower().replace(' ', '_').replace('-', '_')}.py"


def names_in(file: Path) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}


@pytest.mark.full
@pytest.mark.parametrize("title", GROUPS)
def test_example_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example_of(title)), run_name="example")


@pytest.mark.parametrize("title", GROUPS)
def test_every_name_is_used_in_the_example_of_its_group(title: str) -> None:
    names = {name for listed in GROUPS[title].values() for name in listed}
    assert sorted(names - names_in(example_of(title))) == []


def test_examples_import_public_names_only() -> None:
    for file in EXAMPLES.glob("[a-z]*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradmap"):
                assert node.module in ("gradmap_pipeline", "gradmap_pipeline.testing"), file
                assert node.module != "gradmap_pipeline" or {alias.name for alias in node.names} <= set(HOMES)


@pytest.mark.parametrize("name", HOMES)
def test_every_name_is_described_on_its_own(name: str) -> None:
    heading, *paragraphs = PAGE.split(f"\n### {name}\n\n")[1].split("\n### ")[0].split("\n\n")
    assert name in heading
    assert len(paragraphs[0]) > 20
    assert not paragraphs[0].startswith(("The same", "|"))


def test_an_example_that_lacks_a_name_is_seen(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("from gradmap_pipeline import Model, Stage\nassert Model\n")
    assert names_in(tmp_path / "shown.py") == {"Model"}
