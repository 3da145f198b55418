"""Whether llama.cpp's converter takes a model, asked before any step: it reads names and shapes, and writes nothing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import StageError, on_one_line
from ...machine.atomic_folder import scratch_folder
from ...machine.processes import explain_end, tie

if TYPE_CHECKING:
    from ...checkpoint.graph import ModelGraph


def explain_failure(graph: ModelGraph, converter: Path, python: str) -> str | None:
    """What the converter says against the whole model, in the words that an export has; None where it takes it.

    Raises `CapacityError` where it lacks memory or disk.
    """
    from ..folders import write_companions

    with scratch_folder() as scratch:
        folder = scratch / Path(graph.base.name).name
        folder.mkdir()
        write_companions(graph, folder)
        for shard in sorted(graph.base.folder.glob("*.safetensors*")):
            (folder / shard.name).symlink_to(shard.resolve())
        command = [python, str(converter), str(folder), "--outfile", str(scratch / "model.gguf"), "--dry-run"]
        done = subprocess.run(tie(command), capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False)
    if done.returncode == 0:
        return None
    error = explain_end("llama.cpp's converter", done.returncode, done.stderr or "it said nothing")
    if not isinstance(error, StageError):
        raise error
    missing = re.search(r"No module named '(\w+)", str(error))
    return f"{on_one_line(error)}: {python} -m pip install {missing[1]}" if missing else on_one_line(error)
