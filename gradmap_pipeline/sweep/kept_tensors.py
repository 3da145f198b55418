"""The hidden states between layers: in memory up to a limit, the rest in a file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.raw import read_into, write_from

if TYPE_CHECKING:
    import torch

Place = tuple[int, int]
"""Boundary, counted from the bottom; batch."""


@dataclass(frozen=True)
class _Spilled:
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class KeptTensors:
    """Hidden states (B, T, D) of each batch at each boundary.

    A forward sweep fills them from the bottom and a backward sweep reads them from the top, so the lowest go to the file first.
    """

    def __init__(self, limit_bytes: int | None = None, folder: Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        """None: all in memory."""
        self.bytes_written = 0
        self.bytes_read = 0
        self._folder = folder
        self._held: dict[Place, torch.Tensor] = {}
        self._spilled: dict[Place, _Spilled] = {}
        self._held_bytes = 0
        self._file: RawIOBase | None = None
        self._end = 0

    def put(self, boundary: int, batch: int, hidden: torch.Tensor) -> None:
        """Keep the hidden states of a batch at a boundary."""
        while self.limit_bytes is not None and self._held and self._held_bytes + hidden.nbytes > self.limit_bytes:
            self._spill(min(self._held))
        self._held[boundary, batch] = hidden
        self._held_bytes += hidden.nbytes

    def get(self, boundary: int, batch: int) -> torch.Tensor:
        """The hidden states (B, T, D) of a batch at a boundary."""
        held = self._held.get((boundary, batch))
        return self._read(self._spilled[boundary, batch]) if held is None else held

    def drop(self, boundary: int) -> None:
        """Forget one boundary that nothing reads again."""
        for place in [place for place in self._held if place[0] == boundary]:
            self._held_bytes -= self._held.pop(place).nbytes
        for place in [place for place in self._spilled if place[0] == boundary]:
            del self._spilled[place]

    def drop_from(self, boundary: int) -> None:
        """Forget a boundary and all above it; their place in the file is used again."""
        for place in [place for place in self._held if place[0] >= boundary]:
            self._held_bytes -= self._held.pop(place).nbytes
        for place in [place for place in self._spilled if place[0] >= boundary]:
            self._end = min(self._end, self._spilled.pop(place).offset)

    def _spill(self, place: Place) -> None:

        hidden = self._held.pop(place)
        self._held_bytes -= hidden.nbytes
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115 - lives as long as this object; has no name
        write_from(self._file, self._end, hidden.contiguous().cpu())
        self._spilled[place] = _Spilled(self._end, tuple(hidden.shape), hidden.dtype, hidden.device)
        self._end += hidden.nbytes
        self.bytes_written += hidden.nbytes

    def _read(self, spilled: _Spilled) -> torch.Tensor:
        import torch

        assert self._file is not None
        hidden = torch.empty(spilled.shape, dtype=spilled.dtype)
        read_into(self._file, spilled.offset, hidden)
        self.bytes_read += hidden.nbytes
        return hidden.to(spilled.device)
