"""Whether an exported folder is what was written, and still loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..artifacts import LINEAGE, ExportedFile
from ..errors import CommandError, StageError
from ..machine.digests import sha256_of
from ..stages.targets import OWN_DIGEST, find_foreign_files, read_written_files
from .folders import check_loading


def check_folder(folder: Path) -> None:
    """Raise `CommandError` where there is no folder, or nothing in it."""
    try:
        if not folder.exists():
            raise CommandError(f"{str(folder)!r} is not an export: there is no such folder; name the folder of an export")
        if not folder.is_dir():
            raise CommandError(f"{str(folder)!r} is not an export: it is not a folder; name the folder of an export")
        if not any(folder.iterdir()):
            raise CommandError(f"{str(folder)!r} is not an export: the folder is empty; name the folder of an export")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"{str(folder)!r} cannot be read: {reason}; name the folder of an export") from error


def read_lineage(folder: Path) -> dict[str, Any]:
    """How an export came to be. Raises `StageError` where the folder does not say, or says something else than was written."""
    check_folder(folder)
    file = folder / LINEAGE
    if file.exists() and not file.is_file():
        raise StageError(f"{str(folder)!r} is not an export: {LINEAGE} is not a file")
    try:
        lineage = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StageError(f"{str(folder)!r} is not an export: {LINEAGE} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise StageError(f"{str(file)!r} is damaged: it is not JSON") from error
    if not isinstance(lineage, dict) or OWN_DIGEST not in lineage or read_written_files(folder) is None:
        raise StageError(f"{str(file)!r} is damaged: it is not what was written when the folder was exported")
    return lineage


def verify_folder(folder: Path) -> list[str]:
    """Hash every file and load the model; return what was seen, a line each. Raises `StageError` with all that is wrong."""
    lineage = read_lineage(folder)
    written = read_written_files(folder) or {}
    wrong = [f"{name} {reason}" for name, written_file in written.items() if (reason := _explain(folder / name, written_file))]
    if wrong:
        raise StageError("\n".join(f"{folder}: {problem}" for problem in wrong))
    size = sum(file.size for file in written.values())
    lines = [f"{len(written)} files, {size:,} bytes, as they were written by {lineage.get('made_by', 'an unknown program')}"]
    foreign = [name for name, _ in find_foreign_files(folder)]
    if foreign:
        lines.append(f"besides, not part of the export: {', '.join(foreign)}")
    lines.append("it holds no model" if lineage.get("holds") == "comparison" else _load(folder, set(written)))
    return lines


def _explain(file: Path, written: ExportedFile) -> str | None:
    """What is wrong with a file of an export, if anything."""
    if not file.is_file():
        return "is missing"
    if file.is_symlink():
        return "is a link, not the file that was written"
    if file.stat().st_size != written.size:
        return f"has {file.stat().st_size:,} bytes, not {written.size:,}"
    return None if sha256_of(file) == written.sha256 else "has been changed since it was written"


def _load(folder: Path, names: set[str]) -> str:
    if any(name.endswith(".onnx") for name in names):
        import torch

        from .ort.session import OnnxSession

        session = OnnxSession(folder)
        logits, _ = session.run(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long), session.start(1))
        if not logits.isfinite().all():
            raise StageError(f"{folder}: the graph computes values that are not finite")
        return "ONNX Runtime loads and runs it"
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        return f"{gguf} is for llama.cpp, which is not asked here"
    check_loading(folder)
    return "transformers loads it, with no weight missing or left over"
