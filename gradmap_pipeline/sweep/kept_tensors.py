"""What a sweep keeps between its layers: on the device up to a limit, then in the machine's memory, the rest in a file."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.raw import read_into, write_from
from .ledger import Ledger, Line

if TYPE_CHECKING:
    import torch

Place = tuple[int, int]
"""Level, and the batch. A level is a boundary between layers, counted from the bottom, or one of those below."""
TAKEN = (1 << 30) - 1
"""Level of what a linear map took: above all boundaries, and forgotten with them."""
CANDIDATE = TAKEN + 1
"""Level of the hidden states in a model that leaves a layer out: above all boundaries, since each layer reads and writes them."""
GRADIENTS = CANDIDATE + 1
"""Level of the gradients on their way down."""
ARGUMENTS = GRADIENTS + 1
"""First level of what layers are called with: a level for each tensor."""


@dataclass(frozen=True)
class _Spilled:
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class KeptTensors:
    """Tensors of each batch at each level.

    A forward sweep fills boundaries from the bottom and a backward sweep reads them from the top, so the lowest move away first:
    from a GPU into the machine's memory, and from there to a file.
    """

    def __init__(
        self, limit_bytes: int | None = None, folder: Path | None = None, *, host_bytes: int = 0, ledger: Ledger | None = None
    ) -> None:
        """`limit_bytes`: held on the device; None: all. `host_bytes`: held in the machine's memory besides, for a GPU."""
        self.limit_bytes = limit_bytes
        self.host_bytes = host_bytes
        self.bytes_written = 0
        self.bytes_read = 0
        self._folder = folder
        self._ledger = ledger or Ledger()
        self._held: dict[Place, torch.Tensor] = {}
        self._host: dict[Place, tuple[torch.Tensor, torch.device]] = {}
        self._spilled: dict[Place, _Spilled] = {}
        self._held_bytes = 0
        self._host_held = 0
        self._file: RawIOBase | None = None
        self._free: list[tuple[int, int]] = []
        """Parts of the file that are used no more: offset and size, by offset."""
        self._end = 0

    def open_beside(self) -> KeptTensors:
        """Room for other tensors, as large as this, in the same ledger."""
        return KeptTensors(self.limit_bytes, self._folder, host_bytes=self.host_bytes, ledger=self._ledger)

    def put(self, level: int, batch: int, tensor: torch.Tensor) -> None:
        """Keep a tensor, in place of any other there."""
        place = level, batch
        self._forget(place)
        while self.limit_bytes is not None and self._held and self._held_bytes + tensor.nbytes > self.limit_bytes:
            self._move_away(min(self._held))
        self._held[place] = tensor
        self._held_bytes += tensor.nbytes
        self._ledger.add(_line_of(level), tensor.nbytes)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more can be held where they are used, with nothing moved away."""
        return self.limit_bytes is None or self._held_bytes + size <= self.limit_bytes

    def get(self, level: int, batch: int) -> torch.Tensor:
        """The tensor of a batch at a level; a boundary's is (B, T, D)."""
        place = level, batch
        if place in self._held:
            return self._held[place]
        if place in self._host:
            tensor, device = self._host[place]
            return tensor.to(device, non_blocking=True)
        return self._read(self._spilled[place])

    def has(self, level: int, batch: int) -> bool:
        """Whether there is a tensor of a batch at a level."""
        place = level, batch
        return place in self._held or place in self._host or place in self._spilled

    def drop(self, level: int) -> None:
        """Forget a level that nothing reads again."""
        for place in [place for place in self._places() if place[0] == level]:
            self._forget(place)

    def drop_from(self, boundary: int, end: int = CANDIDATE) -> None:
        """Forget a boundary and all levels above it that are below `end`."""
        for place in [place for place in self._places() if boundary <= place[0] < end]:
            self._forget(place)

    def clear(self) -> None:
        """Forget everything, the file too."""
        for place in self._places():
            self._forget(place)
        if self._file is not None:
            self._file.close()
        self._file, self._end, self._free = None, 0, []

    def _places(self) -> list[Place]:
        return [*self._held, *self._host, *self._spilled]

    def forget(self, level: int, batch: int) -> None:
        """Forget the tensor of a batch at a level."""
        self._forget((level, batch))

    def _forget(self, place: Place) -> None:
        if place in self._held:
            size = self._held.pop(place).nbytes
            self._held_bytes -= size
            self._ledger.add(_line_of(place[0]), -size)
        elif place in self._host:
            self._host_held -= self._host.pop(place)[0].nbytes
        elif place in self._spilled:
            spilled = self._spilled.pop(place)
            self._give_back(spilled.offset, spilled.size)

    def _move_away(self, place: Place) -> None:
        """From the device to the machine's memory, where the lowest make room for it by going to the file; else to the file."""
        import torch

        tensor = self._held.pop(place)
        self._held_bytes -= tensor.nbytes
        self._ledger.add(_line_of(place[0]), -tensor.nbytes)
        if tensor.device.type == "cpu" or tensor.nbytes > self.host_bytes:
            self._spill(place, tensor, tensor.device)
            return
        while self._host and self._host_held + tensor.nbytes > self.host_bytes:
            lowest = min(self._host)
            moved, device = self._host.pop(lowest)
            self._host_held -= moved.nbytes
            self._spill(lowest, moved, device)
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self._host[place] = pinned.copy_(tensor), tensor.device
        self._host_held += tensor.nbytes

    def _spill(self, place: Place, tensor: torch.Tensor, device: torch.device) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115 - closed with this object; has no name
            weakref.finalize(self, self._file.close)
        offset = self._take(tensor.nbytes)
        write_from(self._file, offset, tensor.contiguous().cpu())
        self._spilled[place] = _Spilled(offset, tuple(tensor.shape), tensor.dtype, device)
        self.bytes_written += tensor.nbytes

    def _take(self, size: int) -> int:
        """Offset of a part of the file that is free, the first that is large enough."""
        for number, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[number : number + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        offset, self._end = self._end, self._end + size
        return offset

    def _give_back(self, offset: int, size: int) -> None:
        """A part of the file is free; neighbouring parts become one, and the last is cut off."""
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (offset, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = merged[-1][0], merged[-1][1] + length
            else:
                merged.append((start, length))
        if merged and sum(merged[-1]) == self._end:
            self._end = merged.pop()[0]
        self._free = merged

    def _read(self, spilled: _Spilled) -> torch.Tensor:
        import torch

        assert self._file is not None
        tensor = torch.empty(spilled.shape, dtype=spilled.dtype)
        read_into(self._file, spilled.offset, tensor)
        self.bytes_read += tensor.nbytes
        return tensor.to(spilled.device)


def _line_of(level: int) -> Line:
    if level < GRADIENTS:
        return "hidden states"
    return "gradients" if level == GRADIENTS else "layer arguments"
