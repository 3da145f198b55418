"""What every exported folder has besides its weights: config, tokenizer, model card, and how it came to be."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from . import __version__
from .artifacts import LINEAGE, Evaluation, ExportedFile
from .digests import sha256_of
from .errors import OptionError, StageError
from .exports import load_folder
from .report.model_card import make_model_card

if TYPE_CHECKING:
    from .model.graph import ModelGraph
    from .stage import Context


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise `OptionError` unless an export can be written there."""
    if folder.is_file():
        raise OptionError("to", f"{str(folder)!r} is a file; name a folder")
    above = next((parent for parent in folder.resolve().parents if parent.exists()), folder.resolve())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OptionError("to", f"{str(folder)!r} cannot be made: {str(above)!r} is not a folder that can be written to")
    foreign = find_foreign_files(folder) if folder.is_dir() and not overwrite else []
    if foreign:
        found = f"folder {str(folder)!r} holds {foreign[0]!r}, which is not part of an export"
        raise OptionError("to", f"{found}; choose another, or set overwrite: true to delete it")


def write_companions(model: ModelGraph, evaluation: Evaluation | None, folder: Path) -> None:
    """Config, model card, tokenizer and licence. Raises `StageError` unless the tokenizer gives what the base's does."""
    from .model.architecture import prune_config
    from .model.companions import CODE_KEY, copy_companions
    from .model.older import add_older_rope
    from .model.tokenizer_check import check_tokenizer_copy

    config = prune_config(model.base.folder, model.layers)
    config = add_older_rope(model.base.folder, config)
    config.pop(CODE_KEY, None)
    if model.dtype is not None:
        for part in (config, config.get("text_config") or {}):
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = model.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(make_model_card(model, evaluation), encoding="utf-8")
    copy_companions(model.base.folder, folder)
    check_tokenizer_copy(model.base.folder, folder)


def finish_export(folder: Path, lineage: dict[str, Any], files: dict[str, ExportedFile]) -> dict[str, ExportedFile]:
    """Write how the folder came to be; return all files, that one included."""
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")
    return {**files, LINEAGE: describe_file(folder / LINEAGE)}


def find_foreign_files(folder: Path) -> list[str]:
    """Names in a folder that no export wrote there."""
    try:
        lineage = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        written = {LINEAGE, *lineage["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        written = set()
    inside = {name.partition("/")[0] for name in written if "/" in name}  # of a folder that an export wrote, each file counts
    paths = [path for path in folder.iterdir() if path.name not in inside]
    paths += [path for name in inside for path in (folder / name).rglob("*") if not path.is_dir()]
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) not in written)


def make_lineage(
    model: ModelGraph, evaluation: Evaluation | None, files: dict[str, ExportedFile], difference: float | None, context: Context
) -> dict[str, Any]:
    """How the folder came to be, for machines."""
    return {
        "made_by": f"gradmap-pipeline {__version__}",
        "versions": {library: version(library) for library in ("torch", "transformers", "safetensors")},
        "base": {"name": model.base.name, "sha256": model.base.sha256, "layers": model.base.layers},
        "layers_kept": model.layers,
        "layers_removed": model.removed,
        "patched": {name: file.sha256 for name, file in model.patches.items()},
        "steps": [{"id": s.id, "stage": s.stage, "options": s.options, "outputs": s.outputs} for s in context.lineage],
        "evaluation": evaluation.model_dump(mode="json") if evaluation else None,
        "max_logit_difference": difference,
        "files": {name: file.model_dump() for name, file in sorted(files.items())},
    }


def check_loading(folder: Path) -> None:
    """Raise `StageError` when transformers finds weights missing, left over or of another shape. Weights stay on disk, mapped."""
    _, report = load_folder(folder, is_whole=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise StageError(f"the exported folder does not load: {kind.replace('_', ' ')} {sorted(map(str, report[kind]))[:5]}")


def extend_lineage(
    source: Path, options: dict[str, Any], stage: str, files: dict[str, ExportedFile], difference: float
) -> dict[str, Any]:
    """The lineage of a folder made from another export: that of the export, and one more step."""
    lineage: dict[str, Any] = json.loads((source / LINEAGE).read_text(encoding="utf-8"))
    lineage["steps"].append({"id": stage, "stage": stage, "options": options, "outputs": {}})
    lineage |= {"max_logit_difference": difference, "files": {name: file.model_dump() for name, file in sorted(files.items())}}
    return lineage


def describe_files(folder: Path, known: Mapping[str, ExportedFile] = MappingProxyType({})) -> dict[str, ExportedFile]:
    """All files of a folder and its subfolders, by their path in it. `known`: those that are described already."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: known.get(name) or describe_file(folder / name) for name in names}


def describe_file(file: Path) -> ExportedFile:
    """Its size and digest."""
    return ExportedFile(size=file.stat().st_size, sha256=sha256_of(file))
