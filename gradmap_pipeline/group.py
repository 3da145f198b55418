"""The processes that run one recipe together, as `torchrun` starts them; mostly there is one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import CommandError, StageError

if TYPE_CHECKING:
    import torch

_PATIENCE = timedelta(days=7)
"""A process may wait this long for the others; one that has died is noticed at once."""


_MOST = 1 << 20
_ADVICE = "let torchrun set them, or unset them all for a run in one process"


@dataclass(frozen=True)
class Group:
    """This process among those that run the recipe. What is summed comes out the same in all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, samples: torch.Tensor) -> torch.Tensor:
        """This process's share of samples (samples, …)."""
        if len(samples) < self.size:
            raise StageError(f"{len(samples)} samples cannot be shared by {self.size} processes; start fewer, or use more samples")
        return samples[self.rank :: self.size]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            with _others_may_end():
                dist.all_reduce(tensor)
        return tensor

    def sum_values(self, values: Mapping[Any, float]) -> dict[Any, float]:
        """Sum numbers over all processes; all give the same keys."""
        if self.size == 1:
            return dict(values)
        import torch

        keys = sorted(values)
        total = self.sum(torch.tensor([values[key] for key in keys], dtype=torch.float64, device=self._device()))
        return dict(zip(keys, total.tolist(), strict=True))

    def tell(self, value: Any) -> Any:
        """Give every process the JSON value that the leading one has."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode() if self.leads else b""
        with _others_may_end():
            length = torch.tensor([len(text)], device=self._device())
            dist.broadcast(length, src=0)
            data = torch.empty(int(length), dtype=torch.uint8, device=self._device())
            if self.leads:
                data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            dist.broadcast(data, src=0)
        return json.loads(bytes(data.cpu().tolist()))

    def _device(self) -> str:
        import torch.distributed as dist

        return f"cuda:{self.local_rank}" if dist.get_backend() == "nccl" else "cpu"


def read_place(variables: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as `torchrun` sets them. Raises `CommandError` where they are odd."""

    def read(name: str, default: int, least: int, below: int) -> int:
        text = variables.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) < below):
            accepted = f"{least} to {below - 1}" if below < _MOST else f"{least} or more"
            raise CommandError(f"the environment variable {name} is {text!r}, accepted: {accepted}; {_ADVICE}")
        return int(text)

    size = read("WORLD_SIZE", 1, 1, _MOST)
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 else ()
    missing = [name for name in needed if not variables.get(name)]
    if missing:
        raise CommandError(f"the environment variable WORLD_SIZE is {size}, but {' and '.join(missing)} not set; {_ADVICE}")
    if size > 1:
        read("MASTER_PORT", 0, 0, 65536)
    return read("RANK", 0, 0, size), size, read("LOCAL_RANK", 0, 0, size)


@contextmanager
def open_group(device: str) -> Iterator[Group]:
    """Join the processes that `torchrun` started, if it did."""
    rank, size, local = read_place(os.environ)
    if size == 1:
        yield Group()
        return
    import torch
    import torch.distributed as dist

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    with _others_may_end():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Group(rank, size, local)
        with _others_may_end():
            dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def _others_may_end() -> Iterator[None]:
    """Say it plainly when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise StageError("another process of this run has ended; its own message says why. What is finished is kept") from error
