"""How far training has come, kept in a folder, so that a killed run goes on from there to the same bytes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import TensorFile
from ..machine.atomic_folder import write_file
from ..machine.digests import sha256_of

if TYPE_CHECKING:
    import torch

SECONDS = 60.0
"""What a killed run loses at most, besides the step it was at."""
_STATE = "state.json"


class KeptState:
    """Tensors and numbers by name, the last that were kept. What is damaged is as if it were not there."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: of this training alone. None: nothing is kept."""
        self._folder, self._last = folder, time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time to keep the state again."""
        return self._folder is not None and time.monotonic() - self._last >= SECONDS

    def keep(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Take the place of what was kept before, as a whole or not at all. `numbers`: JSON values.

        Each tensor is a file, so that no more than one is in memory once more.
        """
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        before = [path for path in self._folder.iterdir() if path.is_dir()]
        place = self._folder / f"{time.time_ns()}"
        place.mkdir()
        files = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            file = TensorFile.save({"value": tensor.detach().cpu().contiguous()}, place / f"{number}.safetensors")
            files[name] = {"file": f"{place.name}/{number}.safetensors", "sha256": file.sha256}
        write_file(self._folder / _STATE, json.dumps({"numbers": dict(numbers), "tensors": files}), self._folder)
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
        self._last = time.monotonic()

    def find(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What was kept last, whole; None where there is nothing, or it is damaged."""
        if self._folder is None:
            return None
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            state = json.loads((self._folder / _STATE).read_text(encoding="utf-8"))
            files = {name: (self._folder / one["file"], one["sha256"]) for name, one in state["tensors"].items()}
            if all(sha256_of(path) == digest for path, digest in files.values()):
                tensors = {name: TensorFile(path=path, sha256=digest).load()["value"] for name, (path, digest) in files.items()}
                return tensors, dict(state["numbers"])
        return None

    def drop(self) -> None:
        """Keep nothing any more: the training is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
