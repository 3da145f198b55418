"""One call of a step's stage: what it gets beside its inputs, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from ..artifacts import Artifact
from ..context import Context, FinishedStep, compute_anew
from ..machine.distributed import ProcessGroup
from ..machine.environment import Workplace
from ..machine.machine import Machine
from ..machine.memory import peak_bytes
from ..metrics import Metric
from ..recipe.plan import Plan, PlannedStep
from .events import Reporter
from .listening import heard
from .stage_call import call_stage, check_outputs
from .step_context import KeptTensorUnits, ReusedUnits, memory_of, progress_of
from .store import StepFolder, Store


@dataclass
class StepCall:
    """A call of a step's stage, and what it needs."""

    step: PlannedStep
    inputs: Mapping[str, Artifact]
    known: Sequence[Metric]
    """Earlier metrics that the stage reads."""
    lineage: tuple[FinishedStep, ...]
    plan: Plan
    store: Store
    machine: Machine
    reporter: Reporter
    workplace: Workplace | None
    """The other Python that it runs in, if it does."""
    group: ProcessGroup
    """The processes that do it together."""
    told: set[str]
    """What libraries have said, and was told."""
    provenance: Mapping[str, Any] | None = None
    """What an export is to say of how it is made again."""
    reused: ReusedUnits = field(init=False)
    """Units that earlier runs have computed."""

    def __post_init__(self) -> None:
        self.reused = ReusedUnits(self._note)

    def run(self, folder: StepFolder, *, is_leading: bool) -> tuple[BaseModel, dict[str, Any], Callable[[], None]]:
        """Call the stage; units that earlier runs have finished are taken from the store.

        Returns its outputs, checked by the leading process; what the store keeps beside them; and what is to be called when they
        are kept.
        """
        step, store, dtype = self.step, self.store, self.machine.dtype
        tensors = KeptTensorUnits(step, self.workplace, dtype, store, self.group, self.reused)
        remember = memory_of(step, self.workplace, dtype, store, self.group, self.reused)
        units = {"remember": remember, "remember_tensors": tensors.remember, "keep_folder": tensors.keep_folder}
        context = self._open_context(folder, self._note, **units)
        called = time.monotonic()
        result = self._call(context)
        record: dict[str, Any] = {}
        if is_leading:
            check_outputs(step, result, self._take_inputs(), folder)
            record = {"step": step.id, "stage": step.stage.name, "options": step.stage.model_dump(mode="json", by_alias=True)}
            record["seconds"] = time.monotonic() - called + sum(self.reused.seconds)
            record["peak_bytes"] = peak_bytes(context.device)
        return result, record, tensors.drop

    def run_anew(self, folder: StepFolder) -> BaseModel:
        """Call the stage with nothing that earlier calls have left, and without its notes."""

        def compute(key: Any, compute_value: Callable[[], Any]) -> Any:
            return self.group.tell(compute_value())

        units = {"remember": compute, "remember_tensors": compute_anew, "keep_folder": None}
        return self._call(self._open_context(folder, lambda text: None, **units))

    def _call(self, context: Context) -> BaseModel:
        with heard(context.note, self.told):
            return call_stage(self.step, self._take_inputs(), context, self.store, self.workplace, self.machine.threads)

    def _note(self, text: str) -> None:
        self.reporter.note(self.step.id, text)

    def _take_inputs(self) -> BaseModel:
        return self.step.stage.Inputs.model_validate(dict(self.inputs))

    def _open_context(self, folder: StepFolder, note: Callable[[str], None], **units: Any) -> Context:
        machine, together = self.machine, self.group
        device = machine.prepare_torch(together)
        return Context(
            folder=folder.path,
            seed=self.plan.seed,
            device=device,
            dtype=machine.dtype,
            memory=together.least(machine.budget(device, together)),
            progress=progress_of(self.step.id, self.reporter, self.reused),
            note=note,
            group=together,
            lineage=self.lineage,
            step=self.step.id,
            metrics=tuple(self.known),
            host_memory=together.least(machine.host_budget(device, together)),
            provenance=self.provenance,
            **units,
        )
