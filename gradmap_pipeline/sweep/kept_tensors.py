"""What a sweep keeps between its layers: on the device, then in the machine's memory, the rest in a file.

What is used again first stays nearest. On the CPU the first two are one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine.accelerators import is_accelerator, module_of
from .ledger import Ledger, Line
from .spill_file import SpilledTensor, SpillFile

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
class _OnHost:
    """A tensor of an accelerator in the machine's memory, from where the accelerator fetches it by itself."""

    pinned: torch.Tensor
    device: torch.device
    copied: Any
    """Event after which the host may read it."""


class KeptTensors:
    """Tensors of each batch at each level."""

    def __init__(
        self, limit_bytes: int | None = None, folder: Path | None = None, *, host_bytes: int = 0, ledger: Ledger | None = None
    ) -> None:
        """`limit_bytes`: held on the device; None: all. `host_bytes`: held in the machine's memory besides, for an accelerator."""
        self.limit_bytes = limit_bytes
        self.host_bytes = host_bytes
        self.is_going_down = False
        """Whether layers come from the top now, as gradients do."""
        self._ledger = ledger or Ledger()
        self._held: dict[Place, torch.Tensor] = {}
        self._host: dict[Place, _OnHost] = {}
        self._spilled: dict[Place, tuple[SpilledTensor, torch.device]] = {}
        self._held_bytes = 0
        self._host_held = 0
        self._folder = folder
        self._file = SpillFile(folder)
        self._at: Place = (0, -1)
        """The boundary that was read last: how far the layers are."""

    @property
    def bytes_written(self) -> int:
        """To the file."""
        return self._file.bytes_written

    @property
    def bytes_read(self) -> int:
        """From the file."""
        return self._file.bytes_read

    def open_beside(self, times: float) -> KeptTensors:
        """Room for other tensors, so many times as large as this, in the same ledger."""
        limit = None if self.limit_bytes is None else int(self.limit_bytes * times)
        return KeptTensors(limit, self._folder, host_bytes=int(self.host_bytes * times), ledger=self._ledger)

    def put(self, level: int, batch: int, tensor: torch.Tensor) -> None:
        """Keep a tensor, in place of any other there."""
        place = level, batch
        self.forget(level, batch)
        self._held[place] = tensor
        self._held_bytes += tensor.nbytes
        self._ledger.add(_line_of(level), tensor.nbytes)
        while self.limit_bytes is not None and self._held and self._held_bytes > self.limit_bytes:
            self._move_away(max(self._held, key=self._distance))

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more can be held where they are used, with nothing moved away."""
        return self.limit_bytes is None or self._held_bytes + size <= self.limit_bytes

    def get(self, level: int, batch: int) -> torch.Tensor:
        """The tensor of a batch at a level; a boundary's is (B, T, D)."""
        place = level, batch
        if level < TAKEN and not (self.is_going_down and level == self._at[0] + 1):  # there the output of a layer is read, too
            self._at = place
        if place in self._held:
            return self._held[place]
        if place in self._host:
            kept = self._host[place]
            return kept.pinned.to(kept.device, non_blocking=True)
        spilled, device = self._spilled[place]
        return self._file.read(spilled).to(device)

    def has(self, level: int, batch: int) -> bool:
        """Whether there is a tensor of a batch at a level."""
        place = level, batch
        return place in self._held or place in self._host or place in self._spilled

    def forget(self, level: int, batch: int) -> None:
        """Forget the tensor of a batch at a level."""
        place = level, batch
        if place in self._held:
            self._take_from_device(place)
        elif place in self._host:
            self._host_held -= _pinned_bytes(self._host.pop(place).pinned)
        elif place in self._spilled:
            self._file.free(self._spilled.pop(place)[0])

    def drop(self, level: int) -> None:
        """Forget a level that nothing reads again."""
        for place in [place for place in self._places() if place[0] == level]:
            self.forget(*place)

    def drop_from(self, boundary: int, end: int = CANDIDATE) -> None:
        """Forget a boundary and all levels above it that are below `end`."""
        for place in [place for place in self._places() if boundary <= place[0] < end]:
            self.forget(*place)

    def clear(self) -> None:
        """Forget everything, the file too."""
        for place in self._places():
            self.forget(*place)
        self._file.close()

    def _places(self) -> list[Place]:
        return [*self._held, *self._host, *self._spilled]

    def _distance(self, place: Place) -> tuple[int, int, int]:
        """How far off the next use of a tensor is, to be compared with that of others.

        Going up, what layers have read is used again when they come down: from the top, and of one level the first batch first.
        Going down, what lies above is used when they go up again. Gradients are used at each layer, and what layers are called with
        is never made anew, so that it would be read at each.
        """
        (level, batch), (at, current) = place, self._at
        if level >= ARGUMENTS:
            return (-1, 0, batch)
        if level >= TAKEN:
            return (0, int(batch <= current), batch)
        steps = at - level if self.is_going_down else level - at
        is_output = self.is_going_down and steps == -1
        if steps > 0 or ((steps == 0 or is_output) and batch > current):
            return (0, max(0, steps), batch)
        return (1, level if self.is_going_down else -level, batch)

    def _take_from_device(self, place: Place) -> torch.Tensor:
        tensor = self._held.pop(place)
        self._held_bytes -= tensor.nbytes
        self._ledger.add(_line_of(place[0]), -tensor.nbytes)
        return tensor

    def _move_away(self, place: Place) -> None:
        """From the device to the machine's memory, and what is farthest there to the file; on the CPU, to the file."""
        tensor = self._take_from_device(place)
        if not is_accelerator(str(tensor.device)) or _pinned_bytes(tensor) > self.host_bytes:
            self._spilled[place] = self._file.write(tensor.cpu()), tensor.device
            return
        while self._host and self._host_held + _pinned_bytes(tensor) > self.host_bytes:
            farthest = max(self._host, key=self._distance)
            if self._distance(farthest) < self._distance(place):
                self._spilled[place] = self._file.write(tensor.cpu()), tensor.device
                return
            moved = self._host.pop(farthest)
            self._host_held -= _pinned_bytes(moved.pinned)
            moved.copied.synchronize()
            self._spilled[farthest] = self._file.write(moved.pinned), moved.device
        self._host[place] = _copy_to_host(tensor)
        self._host_held += _pinned_bytes(tensor)


def _copy_to_host(tensor: torch.Tensor) -> _OnHost:
    """A copy that the device makes when it comes to it; its own memory is free for what it does after that."""
    import torch

    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    return _OnHost(pinned, tensor.device, module_of(str(tensor.device)).current_stream(tensor.device).record_event())


def _pinned_bytes(tensor: torch.Tensor) -> int:
    """What a tensor takes of pinned memory, which torch hands out in powers of two."""
    return 1 << max(0, tensor.nbytes - 1).bit_length()


def _line_of(level: int) -> Line:
    if level < GRADIENTS:
        return "hidden states"
    return "gradients" if level == GRADIENTS else "layer arguments"
