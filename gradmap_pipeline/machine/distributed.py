"""The processes that run one recipe together, as `torchrun` starts them; mostly there is one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import CommandError, GradmapError, StageError, text_of

if TYPE_CHECKING:
    import torch

_PATIENCE = timedelta(days=7)
"""A process may wait this long for the others; one that has died is noticed at once."""
_PATIENCE_WITH_ERROR = timedelta(seconds=20)
"""One that has failed waits this long for the others, to tell them why."""


_MOST = 1 << 20
_ADVICE = "let torchrun set them, or unset them all for a run in one process"


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that run the recipe. What is summed comes out the same in all of them.

    Before anything is exchanged, the processes compare what they are about to exchange and whether one has failed. So an error
    that one meets alone ends all with its message, and two that have gone different ways say so.
    """

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

            self._meet(f"sum {tuple(tensor.shape)} {tensor.dtype}")
            with _others_may_end():
                dist.all_reduce(tensor)
        return tensor

    def lead(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every process the contiguous tensor that the leading one has, in place."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            self._meet(f"lead {tuple(tensor.shape)} {tensor.dtype}")
            with _others_may_end():
                dist.broadcast(tensor.view(torch.uint8), src=0)  # bytes, since not every type can be sent
        return tensor

    def agree(self, error: Exception | None, *, is_vague: bool = False) -> None:
        """Raise the same error in all processes where one or more has met one; return in all where none has.

        `is_vague`: it says less than another process may have to say, whose error is then raised.
        """
        if error is not None and getattr(error, "is_agreed", False):
            raise error
        if self.size > 1:
            self._meet("agree", error, is_vague=is_vague)
        elif error is not None:
            raise error

    @contextmanager
    def agreeing(self, *kinds: type[Exception]) -> Iterator[None]:
        """A section that succeeds in all processes or, with an error of these kinds, in none."""
        try:
            yield
        except kinds as error:
            self.agree(error)
        else:
            self.agree(None)

    def sum_values(self, values: Mapping[Any, float]) -> dict[Any, float]:
        """Sum numbers over all processes; all give the same keys."""
        if self.size == 1:
            return dict(values)
        import torch

        keys = sorted(values)
        self._meet(f"values {keys}")
        total = self.sum(torch.tensor([values[key] for key in keys], dtype=torch.float64, device=self._device()))
        return dict(zip(keys, total.tolist(), strict=True))

    def tell(self, value: Any) -> Any:
        """Give every process the JSON value that the leading one has."""
        if self.size == 1:
            return value
        self._meet("tell")
        return self._tell(value, 0)

    def _tell(self, value: Any, source: int) -> Any:
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode() if self.rank == source else b""
        with _others_may_end():
            length = torch.tensor([len(text)], device=self._device())
            dist.broadcast(length, src=source)
            data = torch.empty(int(length), dtype=torch.uint8, device=self._device())
            if self.rank == source:
                data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            dist.broadcast(data, src=source)
        return json.loads(bytes(data.cpu().tolist()))

    def _meet(self, purpose: str, error: Exception | None = None, *, is_vague: bool = False) -> None:
        """Wait for all processes. Raises the error of one in all, or says that they are not here for the same purpose."""
        import torch
        import torch.distributed as dist

        code = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big")
        rank = self.size - self.rank  # the lowest rank has the largest number; an error that is not vague has a larger one
        failed = 0 if error is None else rank if is_vague else rank + self.size
        state = torch.tensor([failed, code, -code], device=self._device())
        try:
            with _others_may_end():
                work = dist.all_reduce(state, dist.ReduceOp.MAX, async_op=True)
                work.wait(_PATIENCE if error is None else _PATIENCE_WITH_ERROR)
        except StageError:
            if error is not None:
                raise error from None
            raise
        worst, highest, lowest = state.tolist()
        if worst:
            source = self.size - (worst - self.size if worst > self.size else worst)
            told = self._tell(_describe(error), source)
            if error is None or self.rank != source:
                error = _rebuild(told)
            error.is_agreed = True  # type: ignore[attr-defined]
            raise error
        if highest != -lowest:
            raise StageError(
                f"the processes of this run have gone different ways: one is at {purpose!r}, another elsewhere. What is finished "
                "is kept; run again with one process, and please report this"
            )

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
def open_group(device: str) -> Iterator[ProcessGroup]:
    """Join the processes that `torchrun` started, if it did."""
    rank, size, local = read_place(os.environ)
    if size == 1:
        yield ProcessGroup()
        return
    import torch
    import torch.distributed as dist

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    with _others_may_end():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        group = ProcessGroup(rank, size, local)
        yield group
        group.agree(None)
    finally:
        dist.destroy_process_group()


@contextmanager
def _others_may_end() -> Iterator[None]:
    """Say it plainly when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise StageError("another process of this run has ended; its own message says why. What is finished is kept") from error


def _describe(error: Exception | None) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": "" if error is None else text_of(error),
        **{name: getattr(error, name, None) for name in ("where", "option")},
    }


def _rebuild(told: dict[str, Any]) -> Exception:
    """The error that another process has met."""
    cls = next((cls for cls in _with_subclasses(GradmapError) if cls.__name__ == told["type"]), None)
    message = told["message"] if cls else f"{told['type']}: {told['message']}"
    cls = cls or StageError
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.where = told["where"]
    if told["option"] is not None:
        error.option = told["option"]  # type: ignore[attr-defined]
    return error


def _with_subclasses(cls: type[GradmapError]) -> Iterator[type[GradmapError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _with_subclasses(below)
