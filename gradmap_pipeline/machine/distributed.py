"""The processes that run one recipe together, as a launcher starts them; mostly there is one."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import GradmapError, Interruption, StageError, first_line, name_error
from ..interruptions import OthersEnded
from .joining import join
from .launch import read_place
from .lifeline import Lifeline
from .told_errors import describe_error, rebuild_error

if TYPE_CHECKING:
    import torch

_PATIENCE = timedelta(days=7)
"""A process may wait this long for the others; one that has ended is noticed at once."""
_LONGEST_PAUSE = 0.005
"""Seconds between two looks at an exchange that has not ended."""
_INTERRUPTED = "interrupted; what is finished is kept: run the same command to go on"


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that run the recipe. What is summed comes out the same in all of them.

    Before anything is exchanged, the processes compare what they are about to exchange and whether one has failed. So an error
    that one meets alone is met by all, and two that have gone different ways say so.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    gpu: int = 0
    """Number of this process's GPU, where there are GPUs."""
    _line: Lifeline | None = field(default=None, repr=False, compare=False)
    _places: list[str] = field(default_factory=list, repr=False, compare=False)
    """Where this process is, from outside in, as `at` was told."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, samples: torch.Tensor) -> torch.Tensor:
        """This process's share of samples (samples, …)."""
        if len(samples) < self.size:
            raise StageError(f"{len(samples)} samples cannot be shared by {self.size} processes; start fewer, or use more samples")
        return samples[self.rank :: self.size]

    def split(self, batch_size: int) -> int:
        """Samples of a step that each process takes, as many as any other. Raises `StageError` where there are no such shares."""
        if batch_size % self.size:
            raise StageError(
                f"a step of {batch_size} samples cannot be shared alike by {self.size} processes; set 'batch_size' to a multiple "
                f"of {self.size}, or start another number of processes"
            )
        return batch_size // self.size

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Say what is exchanged inside belongs to, such as a layer: processes that are not at the same place exchange nothing."""
        self._places.append(place)
        try:
            yield
        finally:
            self._places.pop()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            self._meet(f"sum {tuple(tensor.shape)} {tensor.dtype}")
            self._exchange(lambda: dist.all_reduce(tensor, async_op=True))
        return tensor

    def sum_to_leader(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes into that of the leading one, in place; those of the others are used up."""
        if self.size > 1:
            import torch.distributed as dist

            self._meet(f"sum to the leader {tuple(tensor.shape)} {tensor.dtype}")
            self._exchange(lambda: dist.reduce(tensor, dst=0, async_op=True))

    def lead(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every process the contiguous tensor that the leading one has, in place."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            self._meet(f"lead {tuple(tensor.shape)} {tensor.dtype}")
            values = tensor.view(torch.uint8)  # bytes, since not every type can be sent
            self._exchange(lambda: dist.broadcast(values, src=0, async_op=True))
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

    def agree_on(self, what: str, value: str) -> None:
        """Raise `StageError` in all processes unless all have the same value. `what`: it, for people."""
        if self.size > 1:
            self._meet(f"compare {what}", value=value, what=what)

    def sum_values(self, values: Mapping[Any, float]) -> dict[Any, float]:
        """Sum numbers over all processes; all give the same keys."""
        if self.size == 1:
            return dict(values)
        import torch

        keys = sorted(values)
        self._meet(f"values {keys}")
        total = self.sum(torch.tensor([values[key] for key in keys], dtype=torch.float64))
        return dict(zip(keys, total.tolist(), strict=True))

    def deal(self, items: Sequence[int]) -> list[int]:
        """Those that this process takes of items that are dealt out forth and back."""
        return [item for number, item in enumerate(items) if number % (2 * self.size) in (self.rank, 2 * self.size - 1 - self.rank)]

    def least(self, value: int) -> int:
        """The least whole number that any process gives: what may be decided by, where processes have different memory."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        self._meet("least")
        least = torch.tensor([value])
        self._exchange(lambda: dist.all_reduce(least, dist.ReduceOp.MIN, async_op=True))
        return int(least)

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
        length = torch.tensor([len(text)])
        self._exchange(lambda: dist.broadcast(length, src=source, async_op=True))
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._exchange(lambda: dist.broadcast(data, src=source, async_op=True))
        return json.loads(bytes(data.tolist()))

    def _meet(
        self, purpose: str, error: Exception | None = None, *, is_vague: bool = False, value: str = "", what: str = ""
    ) -> None:
        """Wait for all processes. Raises the error of one in all, or says that they are not here for the same purpose."""
        import torch
        import torch.distributed as dist

        place = ": ".join([*self._places, purpose])
        code, held = _number(place), _number(value)
        rank = self.size - self.rank  # the lowest rank has the largest number; an error that is not vague has a larger one
        failed = 0 if error is None else rank if is_vague else rank + self.size
        state = torch.tensor([failed, code, -code, held, -held])
        self._exchange(lambda: dist.all_reduce(state, dist.ReduceOp.MAX, async_op=True))
        worst, highest, lowest, high_value, low_value = state.tolist()
        if worst:
            source = self.size - (worst - self.size if worst > self.size else worst)
            told = self._tell(None if error is None else describe_error(error), source)
            if error is None or self.rank != source:
                error = rebuild_error(told)
            error.is_agreed = True  # type: ignore[attr-defined]
            raise error
        if highest != -lowest:
            raise StageError(
                f"the processes of this run have gone different ways: one is at {place!r}, another elsewhere. What is finished "
                "is kept; run again with one process, and please report this"
            )
        if high_value != -low_value:
            differ = StageError(
                f"the processes of this run have different {what}; start all with the same command, on the same files and versions "
                "of packages"
            )
            differ.is_agreed = True
            raise differ

    def _exchange(self, start: Callable[[], Any]) -> None:
        """Wait for what `start` begins, open to interruptions. Says it plainly when another process is gone."""
        try:
            work, pause = start(), 5e-5
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            work.wait()
        except RuntimeError as error:
            reason = None if self._line is None else self._line.find_reason()
            raise reason or StageError(f"an exchange between the processes of this run failed: {first_line(error)}") from error


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _print_error(error: GradmapError) -> None:
    print(f"error: {name_error(error)}", file=sys.stderr, flush=True)


@contextmanager
def open_group(device: str, end: Callable[[GradmapError], Any] = _print_error) -> Iterator[ProcessGroup]:
    """Join the processes that a launcher started, if it did: all of them leave this section well, or with the same error.

    `device`: as the command line names it. `end`: tells an error where the main thread cannot be brought to raise it; the process
    is ended after it. Raises `LaunchError` where the processes do not find each other.
    """
    place = read_place(os.environ)
    if place.size == 1:
        yield ProcessGroup()
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what goes wrong is told once, by us
    import torch
    import torch.distributed as dist

    store, line, gpu = join(place, device, end)
    try:
        try:
            with_gpu = device != "cpu" and torch.cuda.is_available()
            if with_gpu:
                torch.cuda.set_device(gpu)
            backends = "cpu:gloo,cuda:nccl" if with_gpu else "gloo"
            dist.init_process_group(backends, store=store, rank=place.rank, world_size=place.size, timeout=_PATIENCE)
            group = ProcessGroup(place.rank, place.size, place.local_rank, gpu, line)
            yield group
            group.agree(None)
        except BaseException as error:
            _raise_common(line, error)
        dist.destroy_process_group()
    except OthersEnded as error:  # came while another error was on its way
        _raise_common(line, error)
    finally:
        line.close()


def _raise_common(line: Lifeline, error: BaseException) -> NoReturn:
    """Raise the error that all processes end with, now that this one ends with `error`."""
    if isinstance(error, OthersEnded):
        common: BaseException = line.find_reason() or error
    elif isinstance(error, KeyboardInterrupt):
        told = Interruption(_INTERRUPTED)
        common = line.fail(told)
        common = error if common is told else common
    else:
        common = line.fail(error)
    if common is error:
        raise error
    raise common from error
