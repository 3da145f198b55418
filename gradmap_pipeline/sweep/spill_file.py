"""Tensors in a file without a name, which uses parts again that are free."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.raw import read_into, write_from

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SpilledTensor:
    """Where a tensor lies in the file, and what it is."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class SpillFile:
    """As long as what it holds at a time at most; a killed process leaves none."""

    def __init__(self, folder: Path | None) -> None:
        self.bytes_written = 0
        self.bytes_read = 0
        self._folder = folder
        self._file: RawIOBase | None = None
        self._free: list[tuple[int, int]] = []
        """Parts that are used no more: offset and size, by offset."""
        self._end = 0

    def write(self, tensor: torch.Tensor) -> SpilledTensor:
        """Put a tensor of the CPU into the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115 - closed with this object; has no name
            weakref.finalize(self, self._file.close)
        offset = self._take(tensor.nbytes)
        write_from(self._file, offset, tensor.contiguous())
        self.bytes_written += tensor.nbytes
        return SpilledTensor(offset, tuple(tensor.shape), tensor.dtype)

    def read(self, spilled: SpilledTensor) -> torch.Tensor:
        """The tensor, on the CPU."""
        import torch

        assert self._file is not None
        tensor = torch.empty(spilled.shape, dtype=spilled.dtype)
        read_into(self._file, spilled.offset, tensor)
        self.bytes_read += tensor.nbytes
        return tensor

    def free(self, spilled: SpilledTensor) -> None:
        """A part is used no more; neighbouring parts become one, and the last is cut off."""
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (spilled.offset, spilled.size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = merged[-1][0], merged[-1][1] + length
            else:
                merged.append((start, length))
        if merged and sum(merged[-1]) == self._end:
            self._end = merged.pop()[0]
        self._free = merged

    def close(self) -> None:
        """Give back the disk."""
        if self._file is not None:
            self._file.close()
        self._file, self._end, self._free = None, 0, []

    def _take(self, size: int) -> int:
        """Offset of a part that is free, the first that is large enough."""
        for number, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[number : number + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        offset, self._end = self._end, self._end + size
        return offset
