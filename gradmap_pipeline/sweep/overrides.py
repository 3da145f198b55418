"""Values of parameters that are used instead of those of the checkpoint. They lie in files: there may be some of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import StoredTensor, load_tensor
from .spill_file import SpilledTensor, SpillFile

if TYPE_CHECKING:
    import torch


class Overrides:
    """Values by base layer and by the parameter's name inside it."""

    def __init__(self) -> None:
        self._file = SpillFile(None)
        self._values: dict[int, dict[str, SpilledTensor | StoredTensor]] = {}

    def use_folder(self, folder: Path) -> None:
        """From now on, before there is any value, where the file is."""
        self._file = SpillFile(folder)

    def put(self, layer: int, parameter: str, value: torch.Tensor | StoredTensor) -> None:
        """Keep a value in place of any other. One that is stored is read from where it is stored."""
        values = self._values.setdefault(layer, {})
        self._free(values.pop(parameter, None))
        values[parameter] = value if isinstance(value, StoredTensor) else self._file.write(value.cpu())

    def read(self, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each parameter, on the CPU, in the type that it is kept in."""
        for parameter, value in self._values.get(layer, {}).items():
            yield parameter, self._file.read(value) if isinstance(value, SpilledTensor) else load_tensor(value, None)

    def has(self, layer: int) -> bool:
        """Tell whether another value is kept for any parameter of a layer."""
        return bool(self._values.get(layer))

    def forget(self, layer: int) -> None:
        """The values of the checkpoint are used again."""
        for value in self._values.pop(layer, {}).values():
            self._free(value)

    @contextmanager
    def set_aside(self, layer: int, prefix: str) -> Iterator[bool]:
        """For the time of the `with` block, nothing is kept for parameters whose names begin so but what is put meanwhile.

        Gives whether there was anything.
        """
        values = self._values.get(layer, {})
        aside = {name: values.pop(name) for name in [*values] if name.startswith(prefix)}
        try:
            yield bool(aside)
        finally:
            values = self._values.setdefault(layer, {})
            for name in [name for name in values if name.startswith(prefix)]:
                self._free(values.pop(name))
            values.update(aside)

    def _free(self, value: SpilledTensor | StoredTensor | None) -> None:
        if isinstance(value, SpilledTensor):
            self._file.free(value)
