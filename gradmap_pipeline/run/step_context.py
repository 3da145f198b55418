"""What a stage gets beside its inputs that reaches into the run: units of work that are kept, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..context import Advance
from ..machine.digests import sha256_of_value
from ..machine.distributed import ProcessGroup
from ..machine.environment import Workplace
from ..recipe.plan import PlannedStep
from .events import Progress, Reporter
from .keys import versions_of
from .store import Store

if TYPE_CHECKING:
    import torch


@dataclass
class ReusedUnits:
    """Units of work that a step finds done: by an earlier run, or by an earlier step of this one."""

    note: Callable[[str], None]
    """Tells the user."""
    seconds: list[float] = field(default_factory=list)
    """That they took."""
    is_told: bool = False
    """The user knows that there are some of an earlier run."""

    def add(self, seconds: float, *, is_new: bool = False) -> None:
        """Count one more. `is_new`: it is of this run."""
        if not self.is_told and not is_new:
            self.note("goes on with what an earlier run has finished")
            self.is_told = True
        self.seconds.append(seconds)


def memory_of(
    step: PlannedStep, workplace: Workplace | None, dtype: str, store: Store, group: ProcessGroup, reused: ReusedUnits
) -> Callable[[Any, Callable[[], Any]], Any]:
    """Units of a stage's work, kept under what the stage names as key and the code that made them.

    `reused`: counts those that were computed before.
    """
    versions = versions_of(step, workplace)

    def remember(key: Any, compute: Callable[[], Any]) -> Any:
        whole = sha256_of_value([step.code.digest, dtype, versions, key])
        group.agree_on(f"inputs of step {step.id!r}", whole)
        unit = group.tell(store.load_unit(step.stage.name, whole) if group.leads else None)
        if unit is not None:
            reused.add(unit["seconds"], is_new=whole in store.saved)
            return unit["value"]
        started = time.monotonic()
        value = group.tell(compute())
        if group.leads:
            store.save_unit(step.stage.name, whole, value, time.monotonic() - started)
        return value

    return remember


class KeptTensorUnits:
    """Tensors of finished units, kept from run to run until their step has finished."""

    def __init__(
        self,
        step: PlannedStep,
        workplace: Workplace | None,
        dtype: str,
        store: Store,
        group: ProcessGroup,
        reused: ReusedUnits,
    ) -> None:
        """`reused`: counts those that were computed before."""
        self._stage, self._store, self._group, self._reused = step.stage.name, store, group, reused
        self._step = step.id
        self._made_by = [step.code.digest, dtype, versions_of(step, workplace)]
        self._keys: list[str] = []
        self._folders: list[Path] = []

    def remember(self, key: Any, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """See `Context.remember_tensors`. Processes that work together compute them together, and get those of the leading one."""
        group, whole = self._group, sha256_of_value(["tensors", *self._made_by, key])
        group.agree_on(f"inputs of step {self._step!r}", whole)
        self._keys.append(whole)
        kept = self._store.load_tensors(self._stage, whole) if group.leads else None
        if kept is not None:
            self._reused.add(kept[1])
        if group.tell(kept is not None):
            return lead_tensors(kept[0] if kept is not None else {}, group)
        started = time.monotonic()
        value = lead_tensors(compute(), group)
        if group.leads:
            self._store.save_tensors(self._stage, whole, value, time.monotonic() - started)
        return value

    def keep_folder(self, key: Any) -> Path:
        """See `Context.keep_folder`. Processes that work together share it; the leading one holds it."""
        whole = sha256_of_value(["folder", *self._made_by, key])
        self._group.agree_on(f"inputs of step {self._step!r}", whole)
        folder = self._store.hold_folder(self._stage, whole) if self._group.leads else None
        if folder is not None:
            self._folders.append(folder)
        return Path(self._group.tell(None if folder is None else str(folder)))

    def drop(self) -> None:
        """Forget those that were asked for: their step has finished."""
        for key in self._keys:
            self._store.drop_tensors(self._stage, key)
        for folder in self._folders:
            self._store.drop_folder(folder)


def lead_tensors(tensors: dict[str, torch.Tensor], group: ProcessGroup) -> dict[str, torch.Tensor]:
    """The tensors that the leading process has, in all processes."""
    if group.size == 1:
        return tensors
    import torch

    form = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}
    led = {}
    for name, (dtype, shape) in group.tell(form).items():
        value = tensors[name].cpu().contiguous() if group.leads else torch.empty(shape, dtype=getattr(torch, dtype))
        group.lead(value.reshape(-1))
        led[name] = value
    return led


def progress_of(step: str, reporter: Reporter, reused: ReusedUnits) -> Any:
    """How a stage tells how far it is, for the context of a step. What is `reused` says nothing of how fast it goes on."""

    @contextmanager
    def progress(description: str, total: int, unit: str) -> Iterator[Advance]:
        started, done, skipped, seen = time.monotonic(), 0, 0, len(reused.seconds)

        def report(detail: str = "") -> None:
            seconds = time.monotonic() - started
            rate = (done - skipped) / seconds if done > skipped and seconds > 0 else None
            left = (total - done) / rate if rate else None
            told = rate if unit else None
            reporter.progress(Progress(step, description, done, total, unit, told, left, detail))

        def advance(units: int = 1, /, *, detail: str = "") -> None:
            nonlocal started, done, skipped, seen
            done = min(total, done + units)
            if len(reused.seconds) > seen:
                started, skipped, seen = time.monotonic(), done, len(reused.seconds)
            if not has_ended:
                report(detail)

        has_ended = False
        report()
        yield advance
        has_ended = True
        reporter.progress_ended(step, description)

    return progress
