"""What to say of a plugin that imports from this package what is no longer there: the public name that does the work now."""

from __future__ import annotations

import ast
import linecache
import traceback

from ..api import HOMES, RENAMED

_PACKAGE = __name__.partition(".")[0]

REPLACED = {
    "Boundaries": "open_sweep",
    "GgufSession": "GgufQuantiser",
    "LayerwiseModel": "open_sweep",
    "OnnxSession": "QuantisedGraph",
    "Parity": "GgufConverter",
    "PartedSweep": "SamplePass",
    "Sweep": "open_sweep",
    "check_exportable": "check_onnx_exportable",
    "check_loading": "check_export",
    "check_parity": "write_onnx_folder",
    "check_removable": "check_removal_by_config",
    "choose_kept": "choose_expressible",
    "choose_way": "open_sweep",
    "compare_files": "GgufQuantiser",
    "complete_config": "find_index_programs",
    "explain_failure": "GgufConverter",
    "find_faults": "TaskHarness",
    "guarded": "TaskHarness",
    "is_regular": "check_regular_removal",
    "make_harness": "TaskHarness",
    "measure_needs": "open_sweep",
    "measure_parity": "GgufConverter",
    "name_programs": "find_index_programs",
    "open_folder": "open_model",
    "open_manager": "TaskHarness",
    "pythons": "GgufConverter",
    "quantise_graph": "QuantisedGraph",
    "quietly": "TaskHarness",
    "split_shards": "write_transformers_folder",
    "try_tasks": "TaskHarness",
    "write_folder": "write_transformers_folder",
    "write_graph": "write_onnx_folder",
}
"""Internal names that plugins have imported, and the public name that does their work; `Sweep` was another class."""

MODULES = {
    "group": "ProcessGroup",
    "parts": "SamplePass",
    "partial": "FolderExport",
    "rehearsal": "ModelCosts",
    "survey": "StructureProbe",
    "twins": "check_same_layers",
}
"""The same of modules that are gone, by the last part of their names."""


def suggest_imports(error: BaseException, module: str, name: str | None) -> str | None:
    """What to import instead, as a clause; None where this is not known.

    `module`, `name`: what the error says is not there; no name where it is the module. The names that the plugin's statement
    imports are read from its source.
    """
    names = [name] if name is not None else _find_imported(error)
    if not names and name is None and module.rpartition(".")[2] in MODULES:
        return f"import {MODULES[module.rpartition('.')[2]]} from {_PACKAGE}"
    now = {old: public for old in names if (public := _find_public(old)) is not None}
    if not now:
        return None
    parts = [public if old == public else f"{public} (for {old})" for old, public in now.items()]
    return f"import {', '.join(parts)} from {_PACKAGE}"


def _find_public(name: str) -> str | None:
    return REPLACED.get(name) or RENAMED.get(name) or (name if name in HOMES else None)


def _find_imported(error: BaseException) -> list[str]:
    """Names that the statement which failed imports from this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        source = "".join(linecache.getlines(frame.filename))
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != _PACKAGE:
                continue
            if node.lineno <= (frame.lineno or 0) <= (node.end_lineno or node.lineno):
                return [alias.name for alias in node.names]
    return []
