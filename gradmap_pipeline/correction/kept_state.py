"""A folder keeps how far a training has come, so that a killed run goes on from there to the same bytes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import TensorFile
from ..machine.atomic_folder import write_file
from ..machine.digests import sha256_of, sha256_of_value

if TYPE_CHECKING:
    import torch

SECONDS = 60.0
"""A killed run loses so much at most, besides the step it was at, where the disk is not slow."""
_WRITES = 20
"""The state is kept again after so many times what it took to keep it last."""
_STATE = "state.json"


class KeptState:
    """Tensors and numbers by name, the last that were kept. What is damaged is as if it were not there."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: of this training alone. None: nothing is kept."""
        self._folder, self._last, self._took = folder, time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """True where it is time to keep the state again."""
        return self._folder is not None and time.monotonic() - self._last >= max(SECONDS, _WRITES * self._took)

    def keep(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Take the place of what was kept before, as a whole or not at all. `numbers`: JSON values.

        Each tensor is a file, so that no more than one is in memory once more.
        """
        if self._folder is None:
            return
        started = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        before = [path for path in self._folder.iterdir() if path.is_dir()]
        place = self._folder / f"{time.time_ns()}"
        place.mkdir()
        files = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            file = TensorFile.save({"value": tensor.detach().cpu().contiguous()}, place / f"{number}.safetensors")
            files[name] = {"file": f"{place.name}/{number}.safetensors", "sha256": file.sha256}
        state = {"numbers": dict(numbers), "tensors": files}
        write_file(self._folder / _STATE, json.dumps({"state": state, "sha256": sha256_of_value(state)}), self._folder)
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
        self._last = time.monotonic()
        self._took = self._last - started

    def find(self) -> tuple[Callable[[str], torch.Tensor], dict[str, Any]] | None:
        """Return a function that reads a tensor kept last by its name, and the numbers.

        It returns None where there is nothing, or where any of it is damaged.
        """
        if self._folder is None:
            return None
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            kept = json.loads((self._folder / _STATE).read_text(encoding="utf-8"))
            state, folder = kept["state"], self._folder
            files = {name: TensorFile(path=folder / one["file"], sha256=one["sha256"]) for name, one in state["tensors"].items()}
            if kept["sha256"] == sha256_of_value(state) and all(sha256_of(file.path) == file.sha256 for file in files.values()):
                return lambda name: files[name].load()["value"], dict(state["numbers"])
        return None

    def drop(self) -> None:
        """Keep nothing any more: the training is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
