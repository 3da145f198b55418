"""The rules the code is laid out by: who may import whom, and what may not be imported early."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradmap_pipeline"
PLUGINS = ROOT / "plugins"
HEAVY = {"torch", "transformers", "onnx", "datasets", "safetensors", "numpy", "huggingface_hub", "tokenizers", "rich", "matplotlib"}
ORDER = [
    "api", "interruptions", "errors", "text", "machine", "batches", "metrics", "artifacts", "measurements", "work", "context",
    "page", "builtin", "checkpoint", "sweep", "data", "correction", "cost", "stages", "recipe", "export", "tasks",
    "run", "report", "testing", "template", "cli", "__main__",
]  # fmt: skip
"""Lowest first: a module imports, wherever the import stands, only from those before it, and from its own package."""


def imports_of(file: Path, *, early: bool) -> set[str]:
    """Absolute names of imported modules; `early`: only those that run when the module is imported."""
    tree = ast.parse(file.read_text())
    imported: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                imported.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                imported.add(resolve(file, child))
            elif not (early and runs_later(child)):
                visit(child)

    visit(tree)
    return imported


def runs_later(node: ast.AST) -> bool:
    """The body of a function, or what only a type checker reads."""
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))


def resolve(file: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = file.relative_to(ROOT).with_suffix("").parts[: -node.level]
    return ".".join([*parts, *filter(None, [node.module])])


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("file", modules(PACKAGE) + modules(PLUGINS), ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_heavy_is_imported_early(file: Path) -> None:
    early = {name.split(".")[0] for name in imports_of(file, early=True)}
    assert not early & HEAVY


@pytest.mark.parametrize("file", modules(PACKAGE), ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_import_only_from_below(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        return
    place = file.relative_to(PACKAGE).with_suffix("").parts[0]
    below = set(ORDER[: ORDER.index(place) + 1])
    for name in imports_of(file, early=False):
        parts = name.split(".")
        if parts[0] == "gradmap_pipeline" and len(parts) > 1:
            assert parts[1] in below, f"{place} imports {name}"


@pytest.mark.parametrize("file", modules(PLUGINS), ids=lambda file: file.name)
def test_plugins_do_not_know_each_other(file: Path) -> None:
    for name in imports_of(file, early=False):
        assert not name.startswith(("gradmap_plugins", "plugins")), name


def test_package_does_not_know_the_plugins() -> None:
    for file in modules(PACKAGE):
        assert not any("gradmap_plugins" in name for name in imports_of(file, early=False)), file


def test_public_names_are_in_one_group_and_exist() -> None:
    import gradmap_pipeline
    from gradmap_pipeline.api import GROUPS

    listed = [name for group in GROUPS.values() for names in group.values() for name in names]
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == sorted(gradmap_pipeline.__all__)
    assert all(getattr(gradmap_pipeline, name) is not None for name in listed)
    with pytest.raises(AttributeError, match="has no attribute 'Stag'"):
        _ = gradmap_pipeline.Stag


def test_type_checkers_see_every_public_name() -> None:
    from gradmap_pipeline.api import HOMES

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.asname: (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: (module, name) for name, module in HOMES.items()}


def test_help_lists_every_public_name() -> None:
    import pydoc

    import gradmap_pipeline

    text = pydoc.plain(pydoc.render_doc(gradmap_pipeline)).partition("PACKAGE CONTENTS")[0]
    shown = set(re.findall(r"\w+", text))
    assert not set(gradmap_pipeline.__all__) - shown
    assert text.index("Sweeps") < text.index("open_sweep") < text.index("Corrections") < text.index("correct_site")


@pytest.mark.parametrize(
    "file",
    modules(PLUGINS) + modules(PACKAGE / "template"),
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_plugins_import_only_public_names(file: Path) -> None:
    from gradmap_pipeline.api import HOMES

    allowed = {"gradmap_pipeline", "gradmap_pipeline.testing"} if "tests" in file.parts else {"gradmap_pipeline"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("gradmap_pipeline") for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradmap_pipeline"):
            assert node.module in allowed, ast.unparse(node)
            if node.module == "gradmap_pipeline":
                assert {alias.name for alias in node.names} <= set(HOMES), ast.unparse(node)


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["stages"], ["schema"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = "import sys; from gradmap_pipeline.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stderr.split())
    assert "gradmap_pipeline.cli.commands" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy"}


PRIVATE = re.compile(
    r"transformers\.(?:conversion_mapping|core_model_loading|modeling_utils|cache_utils|pytorch_utils)|DynamicCache|logits_to_keep"
    r"|_is_hf_initialized|_get_dtype_plan|all_tied_weights_keys|\.tie_weights\(missing|_adjust_missing|\.initialize_weights\("
)


def test_one_file_knows_what_is_private_in_transformers() -> None:
    users = [file.relative_to(ROOT) for file in modules(PACKAGE) + modules(PLUGINS) if PRIVATE.search(file.read_text())]
    assert users == [Path("gradmap_pipeline/checkpoint/adapter.py")]


def test_every_file_says_what_it_is_for() -> None:
    for file in modules(PACKAGE) + modules(PLUGINS) + modules(ROOT / "tests"):
        assert ast.get_docstring(ast.parse(file.read_text())) or file.stat().st_size == 0, file


def test_files_are_short() -> None:
    lengths = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in modules(PACKAGE) + modules(PLUGINS)}
    assert {file: length for file, length in lengths.items() if length > 300} == {}


def test_every_file_of_tests_holds_some() -> None:
    """An empty file passes without a sign."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert [file.name for file in files if "def test_" not in file.read_text()] == []
