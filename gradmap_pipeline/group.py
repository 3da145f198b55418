"""The processes that run one recipe together, as `torchrun` starts them; mostly there is one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import StageError

if TYPE_CHECKING:
    import torch

_PATIENCE = timedelta(days=7)
"""A process may wait this long for the others; one that has died is noticed at once."""


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


@contextmanager
def open_group(device: str) -> Iterator[Group]:
    """Join the processes that `torchrun` started, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    with _others_may_end():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Group(int(os.environ["RANK"]), size, local)
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
