"""Write the reference pages from the code: `python tests/tools/reference.py docs`."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

import gradmap_pipeline
from gradmap_pipeline.api import GROUPS, HOMES
from gradmap_pipeline.cli import app
from gradmap_pipeline.recipe.catalog import Catalog, load_catalog
from gradmap_pipeline.recipe.recipe import RecipeFile
from gradmap_pipeline.report.stage_help import list_options
from gradmap_pipeline.stages.stage import name_types

_EXAMPLES = Path(__file__).parent.parent / "api_examples"
_ABOUT_API = """\
What `from gradmap_pipeline import ...` has for plugins, version {version} of the API; plugins that ship import nothing else.
[Write a plugin](write-a-plugin.md#which-version-of-gradmap-pipeline) says what stays as it is. `gradmap_pipeline.testing` has
what tests of plugins need.

Sizes of tensors: B sequences, T tokens, D hidden, V vocabulary. Memory and files are counted in bytes, times in seconds, losses in
nats. `OptionError` and `ModelError` refuse before a run; `StageError`, `QualityError` and `CapacityError` end one."""
_NOTE = "<!-- Written by `make docs` from the code; do not edit. -->"


def make_pages() -> dict[str, str]:
    """Text by file name under `reference/`."""
    catalog = load_catalog()
    return {"recipe.md": make_recipe_page(), "stages.md": make_stages_page(catalog), "command-line.md": make_command_page()}


def make_recipe_page() -> str:
    """Every key of a recipe but the stages' options."""
    lines = [_NOTE, "", "# Recipe reference", "", inspect.cleandoc(RecipeFile.__doc__ or ""), ""]
    lines += _options_table(list_options(RecipeFile))
    return "\n".join([*lines, ""])


def make_stages_page(catalog: Catalog) -> str:
    """Every stage that ships: what it takes, gives and accepts."""
    lines = [_NOTE, "", "# Stages"]
    for name, stage in catalog.stages.items():
        if not catalog.plugin_of[name].startswith("gradmap_plugins."):
            continue
        takes = [
            f"`{port}` ({name_types(kinds)}{'' if required else ', optional'})"
            for port, (kinds, required) in stage.input_fields().items()
        ]
        gives = [f"`{port}` ({cls.__name__})" for port, cls in stage.output_fields().items()]
        lines += ["", f"## {name}", "", inspect.cleandoc(stage.__doc__ or ""), ""]
        lines += [f"Takes {', '.join(takes)}. Gives {', '.join(gives)}.", ""]
        lines += _options_table(list_options(stage))
    return "\n".join([*lines, ""])


def make_command_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    lines = [_NOTE, "", "# Command line", "", group.help, "", group.epilog]
    for name, command in _list_commands(group):
        arguments = " ".join(
            (parameter.metavar or parameter.name.upper()) if parameter.required else f"[{parameter.name.upper()}]"
            for parameter in command.params
            if parameter.param_type_name == "argument"
        )
        lines += [
            "",
            f"## gradmap {name}",
            "",
            f"`gradmap {' '.join(filter(None, (name, arguments)))} {'COMMAND' if hasattr(command, 'commands') else '[OPTIONS]'}`",
            "",
            command.help,
        ]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option" and parameter.name != "help"]
        if options:
            lines += ["", "| option | default | |", "|---|---|---|"]
        for option in options:
            shown = option.opts[0] + (f" {option.metavar}" if option.metavar else "")
            default = "" if option.default in (None, False, []) or not option.show_default else f"`{option.default}`"
            lines.append(f"| `{shown}` | {default} | {option.help} |")
    return "\n".join([*lines, ""])


def _list_commands(group: Any) -> Iterator[tuple[str, Any]]:
    """Commands by name; those of a group in a group as `store ls`, after the group itself, which has none of its own options."""
    for name, command in group.commands.items():
        yield name, command
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", one) for inner, one in _list_commands(command))


def make_api_page() -> str:
    """Every public name by group: signature, what it does, its members, and an example."""
    lines = [_NOTE, "", "# Plugin API", "", _ABOUT_API.format(version=gradmap_pipeline.API_VERSION)]
    lines += ["", "| group | names |", "|---|---|"]
    for title, modules in GROUPS.items():
        names = ", ".join(f"`{name}`" for listed in modules.values() for name in listed)
        lines.append(f"| [{title}](#{title.lower().replace(' ', '-')}) | {names} |")
    for title, modules in GROUPS.items():
        lines += ["", f"## {title}"]
        for name in (name for listed in modules.values() for name in listed):
            lines += ["", f"### {name}", "", *_describe_public(name)]
        file = f"{title.lower().replace(' ', '_').replace('-', '_')}.py"
        lines += ["", f"### Example: {title.lower()}", "", "```python", f"# examples/{file}"]
        lines += [(_EXAMPLES / file).read_text(encoding="utf-8").strip(), "```"]
    return "\n".join([*lines, ""])


def _describe_public(name: str) -> list[str]:
    """Signature, docstring and members of a public name."""
    public = getattr(gradmap_pipeline, name)
    if not (inspect.isclass(public) or inspect.isfunction(public)):
        said = _find_docstring(sys.modules[f"gradmap_pipeline.{HOMES[name]}"], name) or ""
        shown = f" = {public!r}" if isinstance(public, int | str) else ""
        return [f"`{name}{shown}`", *(["", said] if said else [])]
    lines = [f"`{_show_head(name, public)}`", "", inspect.cleandoc(public.__doc__ or "")]
    if not inspect.isclass(public):
        return lines
    tree = _parse_class(public)
    members = [] if tree is None else _list_members(tree)
    return [*lines, *(["", "| member | |", "|---|---|", *members] if members else [])]


def _show_head(name: str, public: Any) -> str:
    """`class` and the bases that are public, or the signature as it is written."""
    if inspect.isclass(public):
        bases = [base.__name__ for base in public.__bases__ if base.__name__ in HOMES]
        return f"class {name}({', '.join(bases)})" if bases else f"class {name}"
    node = ast.parse(textwrap.dedent(inspect.getsource(public))).body[0]
    assert isinstance(node, ast.FunctionDef)
    return f"{name}{_show_signature(node)}"


def _show_signature(node: ast.FunctionDef) -> str:
    returned = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"({ast.unparse(node.args)}){returned}"


def _parse_class(public: type) -> ast.ClassDef | None:
    node = ast.parse(textwrap.dedent(inspect.getsource(public))).body[0]
    return node if isinstance(node, ast.ClassDef) else None


def _list_members(tree: ast.ClassDef) -> list[str]:
    """Rows of fields, properties and methods whose names have no underscore."""
    rows = []
    for place, node in enumerate(tree.body):
        said = ""
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, shown = node.target.id, f"{node.target.id}: {ast.unparse(node.annotation)}"
            after = tree.body[place + 1] if place + 1 < len(tree.body) else None
            said = _text_of(after) or _description_of(node.value)
        elif isinstance(node, ast.FunctionDef):
            is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
            returned = "" if node.returns is None else ast.unparse(node.returns)
            name, shown = node.name, f"{node.name}: {returned}" if is_property else f"{node.name}{_show_signature(node)}"
            said = ast.get_docstring(node) or ""
        else:
            continue
        if not name.startswith("_"):
            rows.append(f"| `{shown.replace('|', 'or')}` | {' '.join(said.split()).replace('|', chr(92) + '|')} |")
    return rows


def _text_of(node: ast.stmt | None) -> str:
    """A text that stands alone, as docstrings of fields do."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return node.value.value if is_text else ""  # type: ignore[union-attr, return-value]


def _description_of(value: ast.expr | None) -> str:
    """What `Field(description=...)` says."""
    for word in value.keywords if isinstance(value, ast.Call) else []:
        if word.arg == "description" and isinstance(word.value, ast.Constant):
            return str(word.value.value)
    return ""


def _find_docstring(module: ModuleType, name: str) -> str | None:
    """The text below an assignment in a module."""
    body = ast.parse(inspect.getsource(module)).body
    for node, after in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return inspect.cleandoc(_text_of(after)) or None
    return None


def _options_table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    if not rows:
        return ["No options."]
    table = ["| option | accepted | default | |", "|---|---|---|---|"]
    for option, accepted, default, description in rows:
        shown = f"`{default}`" if default else ""
        table.append(f"| `{option}` | {accepted.replace('|', 'or')} | {shown} | {description.replace('|', chr(92) + '|')} |")
    return table


def main() -> None:
    """Write the pages into the folder named on the command line."""
    folder = Path(sys.argv[1]) / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in make_pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder.parent / "api.md").write_text(make_api_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
