"""Whether an exported folder is what was written, and still loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .artifacts import LINEAGE
from .digests import sha256_of
from .errors import StageError
from .folders import check_loading, find_foreign_files


def read_lineage(folder: Path) -> dict[str, Any]:
    """How an export came to be. Raises `StageError` where the folder does not say."""
    try:
        lineage = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        if not isinstance(lineage["files"], dict):
            raise TypeError(f"'files' is a {type(lineage['files']).__name__}")
    except OSError as error:
        raise StageError(f"{str(folder)!r} is no export: {LINEAGE} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{str(folder / LINEAGE)!r} is damaged: {error}") from error
    return dict(lineage)


def verify_folder(folder: Path) -> list[str]:
    """Hash every file and load the model; return what was found, a line each. Raises `StageError` with all that is wrong."""
    lineage = read_lineage(folder)
    wrong = []
    for name, written in lineage["files"].items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != written["size"]:
            wrong.append(f"{name} has {file.stat().st_size:,} bytes, not {written['size']:,}")
        elif sha256_of(file) != written["sha256"]:
            wrong.append(f"{name} has been changed since it was written")
    if wrong:
        raise StageError("\n".join(f"{folder}: {problem}" for problem in wrong))
    size = sum(written["size"] for written in lineage["files"].values())
    found = [f"{len(lineage['files'])} files, {size:,} bytes, as they were written by {lineage['made_by']}"]
    foreign = [name for name in find_foreign_files(folder) if name != LINEAGE]
    if foreign:
        found.append(f"besides, not part of the export: {', '.join(foreign)}")
    found.append(_load(folder, set(lineage["files"])))
    return found


def _load(folder: Path, names: set[str]) -> str:
    if "model.onnx" in names:
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
