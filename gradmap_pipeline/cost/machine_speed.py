"""The speed at which this machine reads, writes, digests, multiplies and trains. Each is measured once, at its first use."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..errors import StageError
from ..machine.memory import free_bytes
from .estimate import Estimate

if TYPE_CHECKING:
    import torch

    from ..checkpoint.checkpoint import StoredTensor
    from ..checkpoint.graph import BaseCheckpoint

_READ = 16 << 20  # bytes at once
_READS = 8
_BLOCK = 4 << 20
_BLOCKS = 16
_WIDTH = 1024  # of the matrices multiplied
_INPUTS = 2048  # of the correction whose sums are tried
_UPDATED = 4 << 20  # parameters at once
_CHARACTERS = 200_000
_VERY_LONG = 20
"""Times what is to be measured at least: what is prepared at the first call does not show any more."""


def time_call(
    call: Callable[[], object], *, at_least: float = 0.2, at_most: int = 9, wait: Callable[[], object] = lambda: None
) -> float:
    """Seconds of one call: the median of those after the first, which finds nothing prepared; of the first if it is very long.

    Calls are made until they have taken `at_least` seconds together. `wait` returns when what the call has started is done.
    """

    def measure() -> float:
        wait()
        started = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - started

    first = measure()
    if first > _VERY_LONG * at_least:
        return first
    seconds = [measure()]
    while sum(seconds) < at_least and len(seconds) < at_most:
        seconds.append(measure())
    return median(seconds)


class MachineSpeed:
    """Seconds for each unit of a kind of work."""

    def __init__(self, base: BaseCheckpoint, dtype: torch.dtype, device: str, memory: int, store: Path) -> None:
        """`memory`: bytes a run may have resident."""
        self._base, self._dtype, self._device, self._memory, self._store = base, dtype, device, memory, store

    @cached_property
    def read(self) -> float:
        """Seconds for a byte of the checkpoint, cast to the type to compute in, when it is read for the first time."""
        return self._read_twice[0]

    def read_again(self, besides: int = 0) -> float:
        """Seconds for a byte that was read before: the system keeps files in the memory nobody uses, as far as it goes.

        `besides`: bytes of other files that are read and written.
        """
        size = sum(tensor.size for tensor in self._base.tensors.values()) + besides
        free = free_bytes() - (0 if self._device.startswith("cuda") else self._memory)
        kept = min(1.0, max(0.0, free / size))
        first, again = self._read_twice
        return kept * again + (1 - kept) * first

    @cached_property
    def _read_twice(self) -> tuple[float, float]:
        """Timed on blocks at random places."""
        from ..checkpoint.checkpoint import ITEM_BYTES, StoredTensor, load_tensor

        tensors = [tensor for tensor in self._base.tensors.values() if tensor.size]
        blocks: list[StoredTensor] = []
        for tensor in random.choices(tensors, [tensor.size for tensor in tensors], k=_READS):  # others were read last time
            item = ITEM_BYTES[tensor.dtype]
            elements = min(tensor.elements, _READ // item)
            start = tensor.start + random.randint(0, tensor.elements - elements) * item
            blocks.append(StoredTensor(tensor.file, tensor.name, tensor.dtype, (elements,), start))
        size = sum(block.size for block in blocks)
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            for block in blocks:
                with suppress(StageError):  # weights that do not fit the type are told by what computes with them
                    load_tensor(block, self._dtype)
            seconds.append((time.perf_counter() - started) / size)
        return seconds[0], seconds[1]

    @cached_property
    def digest(self) -> float:
        """Seconds for a byte whose SHA-256 is computed."""
        import hashlib

        data = bytes(_BLOCK)
        return time_call(lambda: hashlib.sha256(data).digest()) / _BLOCK

    @cached_property
    def write(self) -> float:
        """Seconds for a byte written where the store is, until it is on the disk."""
        import os

        data = bytes(_BLOCK)
        above = next(folder for folder in (self._store.resolve(), *self._store.resolve().parents) if folder.is_dir())

        def time_writing(folder: Path | None) -> float:
            with tempfile.TemporaryFile(buffering=0, dir=folder) as file:
                started = time.perf_counter()
                for _ in range(_BLOCKS):
                    file.write(data)
                os.fsync(file)
                return (time.perf_counter() - started) / (_BLOCKS * _BLOCK)

        try:
            return time_writing(above)
        except OSError:  # a run will say so
            return time_writing(None)

    @cached_property
    def double_flop(self) -> float:
        """Seconds for a floating-point operation in fp64."""
        import torch

        matrix = torch.ones(_WIDTH, _WIDTH, dtype=torch.float64, device=self._device)
        return time_call(lambda: torch.mm(matrix, matrix).sum().item()) / (2 * _WIDTH**3)

    @cached_property
    def moments_flop(self) -> float:
        """Seconds for one of the 2 N F (F + D) operations in the sums of a correction: N tokens, F inputs, D outputs."""
        import torch

        from ..correction.ridge import Moments

        def zeros(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=self._device)

        moments = Moments(zeros(_INPUTS, _INPUTS), zeros(_INPUTS, _WIDTH), 0.0)
        taken, missing = zeros(_WIDTH, _INPUTS, torch.float32) + 1, zeros(_WIDTH, _WIDTH)

        def add() -> float:
            moments.add(taken, missing)
            return moments.missing  # which waits for a GPU

        return time_call(add) / (2 * _WIDTH * _INPUTS * (_INPUTS + _WIDTH))

    def correction(self, inputs: int, width: int, tokens: int) -> Estimate:
        """The sums of one correction of a linear map with so many inputs over tokens, and their solution."""
        sums, solution = 2 * tokens * inputs * (inputs + width), inputs**3 / 3 + 2 * inputs**2 * width
        return Estimate(flops=sums + solution, seconds=sums * self.moments_flop + solution * self.double_flop)

    @cached_property
    def update(self) -> float:
        """Seconds for a parameter that a step of Adam changes, in fp32."""
        import torch

        from ..correction.adam import Adam

        weights, gradients = (torch.ones(_UPDATED, device=self._device) for _ in range(2))
        adam = Adam({"weights": weights})

        def step() -> float:
            adam.step({"weights": gradients}, {"weights": 0.0})
            return float(weights[0])  # which waits for a GPU

        return time_call(step) / _UPDATED

    @cached_property
    def tokenizer(self) -> tuple[float, float]:
        """Seconds to read the model's tokenizer, and for a token that it makes from text."""
        from ..builtin.text import load_documents
        from ..checkpoint import pretrained
        from ..checkpoint.source import BUILTIN_FOLDER
        from ..data import load_tokenizer

        text = "".join(load_documents("heldout"))[:_CHARACTERS]
        pretrained.load_tokenizer(BUILTIN_FOLDER)  # a small one, which imports what tokenizers take
        started = time.perf_counter()
        tokenizer = load_tokenizer(self._base)
        read = time.perf_counter()
        tokens = len(tokenizer(text)["input_ids"])
        return read - started, (time.perf_counter() - read) / tokens
