"""Run a plan: take each step from the store, or run it and put it there."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from ..artifacts import Artifact
from ..checkpoint.graph import ModelGraph, open_model
from ..context import Context, FinishedStep
from ..errors import CapacityError, GradmapError, RecipeError, StageError, describe_value, name_error, on_one_line, text_of
from ..export.exports import Export
from ..interruptions import is_interruption
from ..machine.atomic_folder import scratch_folder
from ..machine.distributed import ProcessGroup
from ..machine.environment import Workplace
from ..machine.machine import ALONE, Machine
from ..machine.memory import give_back, tune_allocator
from ..machine.shortages import find_shortage
from ..machine.streams import plugin_code
from ..recipe.asking import name_method
from ..recipe.plan import Plan, PlannedStep
from .events import Reporter, RunFinished, RunStarted, StepFinished, StepStarted
from .inspection import inspect_steps
from .isolation import WorkerCrash, run_elsewhere
from .keys import make_key
from .listening import heard
from .output_checks import find_output_faults
from .step_context import memory_of, progress_of
from .store import StepFolder, Store
from .summary import summarise


@dataclass
class RunState:
    """Where a run stands."""

    outputs: dict[str, dict[str, Artifact]] = field(default_factory=dict)
    """By step id, then output name."""
    lineage: dict[str, tuple[FinishedStep, ...]] = field(default_factory=dict)
    """By step id: the steps that led to it, itself last."""
    finished: list[StepFinished] = field(default_factory=list)
    inspected: bool = False
    """Whether the stages of all steps that are to run have looked at the model."""
    heard: set[str] = field(default_factory=set)
    """What libraries have said, and was told."""


def run_plan(plan: Plan, store: Store, machine: Machine, reporter: Reporter, group: ProcessGroup = ALONE) -> RunState:
    """Run every step in order; what the store holds is not run again.

    All processes of a group go through the plan; the leading one alone writes into the store and decides what is in it.
    """
    for step in plan.steps:
        _ = step.code.digest  # of the code that is about to run, whatever is edited meanwhile
    tune_allocator(tight=machine.memory is not None)
    if machine.device.startswith("cuda"):
        machine.prepare_torch(group)  # says at once that there is no such device
    try:
        return _run_steps(plan, store, machine, reporter, group)
    finally:
        store.close()


def _run_steps(plan: Plan, store: Store, machine: Machine, reporter: Reporter, group: ProcessGroup) -> RunState:
    started = time.monotonic()
    if group.leads:
        store.prepare()
        reporter.run_started(RunStarted(recipe=str(plan.recipe_path), steps=[step.id for step in plan.steps]))
        base = open_model(plan.model, store.digest_of)
        group.tell("the model's digest is known")
    else:
        group.tell(None)
        base = open_model(plan.model, store.digest_of)
    state = RunState(outputs={"model": {"model": base}}, lineage={"model": ()})
    for step in plan.steps:
        try:
            _run_step(step, plan, store, machine, reporter, state, group)
        except Exception as error:
            group.agree(error)
            raise
        except BaseException as error:  # of code that is not asked through its stage, such as an artifact's own checks
            if is_interruption(error):
                raise
            failure = StageError(f"stage {step.stage.name!r} ({step.plugin}) failed: {name_error(error)}")
            failure.where = f"step {step.id!r}"
            group.agree(failure)
            raise failure from error
    tables = summarise(state.outputs, state.finished)
    reporter.run_finished(RunFinished(seconds=time.monotonic() - started, summary=tables))
    return state


def _run_step(
    step: PlannedStep, plan: Plan, store: Store, machine: Machine, reporter: Reporter, state: RunState, group: ProcessGroup
) -> None:
    name, started = step.stage.name, time.monotonic()
    reporter.step_started(StepStarted(step=step.id, stage=name))
    for notice in step.notices:
        reporter.note(step.id, notice)
    inputs = _find_inputs(step, state)
    workplace = _workplace_of(step, store)
    key = make_key(step, inputs, plan.seed, machine.dtype, store, workplace)
    lineage = _join(state.lineage[source] for source, _ in step.inputs.values())
    result = store.load(name, key, step.stage.Outputs)
    cached: bool = group.tell(result is not None)
    if not cached:
        if not state.inspected:
            rest = plan.steps[plan.steps.index(step) :]
            with heard(lambda text: reporter.note(step.id, text), state.heard):
                inspect_steps(rest, state.outputs["model"]["model"], machine.budget("cpu", group))  # type: ignore[arg-type]
            for later in rest:
                if group.leads and (place := _workplace_of(later, store)) is not None:
                    _prepare(place, later, reporter)
            state.inspected = True
        together = group if step.stage.parallel else ALONE
        if group.leads or step.stage.parallel:
            with store.step(name, key) if group.leads else _scratch_step() as folder, _noticing_loss(step, store, folder):
                device = machine.prepare_torch(group)
                found_finished: list[float] = []
                context = Context(
                    folder=folder.path,
                    seed=plan.seed,
                    device=device,
                    dtype=machine.dtype,
                    memory=machine.budget(device, group),
                    progress=progress_of(step.id, reporter),
                    note=lambda text: reporter.note(step.id, text),
                    remember=memory_of(step, workplace, machine.dtype, store, together, found_finished),
                    group=together,
                    lineage=lineage,
                    step=step.id,
                )
                called = time.monotonic()
                taken = step.stage.Inputs.model_validate(inputs)
                with heard(context.note, state.heard):
                    result = _call(step, taken, context, store, workplace, machine.threads)
                if group.leads:
                    _check_outputs(step, result, taken, folder)
                    record: dict[str, Any] = {"step": step.id, "stage": name, "options": step.stage.model_dump(mode="json")}
                    record["seconds"] = time.monotonic() - called + sum(found_finished)
                    result = _keep(result, step, store, folder, key, record)
            give_back(between_steps=True)
        group.tell("the result is in the store")
    if not group.leads:
        result = store.load(name, key, step.stage.Outputs)
    if result is None:
        raise StageError(f"the result of step {step.id!r} is not in {str(store.root)!r}; all processes must share that folder")
    base = state.outputs["model"]["model"]
    given = {output: getattr(result, output) for output in type(result).model_fields}
    made = {output: artifact.with_names_of(step.stage) for output, artifact in given.items() if artifact is not None}
    outputs = {output: _at_base(artifact, base) for output, artifact in made.items()}
    state.outputs[step.id] = outputs
    options = step.stage.model_dump(mode="json")
    this = FinishedStep(step.id, name, options, {output: artifact.content() for output, artifact in outputs.items()})
    state.lineage[step.id] = (*lineage, this)
    finished = StepFinished(
        step=step.id,
        stage=name,
        cached=cached,
        seconds=time.monotonic() - started,
        computed_seconds=store.seconds_of(name, key),
        outputs={output: artifact.model_dump(mode="json") for output, artifact in outputs.items()},
    )
    state.finished.append(finished)
    reporter.step_finished(finished)


def _find_inputs(step: PlannedStep, state: RunState) -> dict[str, Artifact]:
    """The artifacts a step takes, without those that a step before chose not to make."""
    inputs = {name: state.outputs[source].get(output) for name, (source, output) in step.inputs.items()}
    for name, (_, required) in type(step.stage).input_fields().items():
        if required and inputs[name] is None:
            failure = StageError(f"needs {'.'.join(step.inputs[name])!r}, which that step did not make this time")
            failure.where = f"step {step.id!r}"
            raise failure
    return {name: artifact for name, artifact in inputs.items() if artifact is not None}


def _at_base(artifact: Artifact, model: Artifact) -> Artifact:
    """A stored graph over the recipe's model, wherever that lies now."""
    assert isinstance(model, ModelGraph)
    if isinstance(artifact, Export):
        return artifact.model_copy(update={"graph": _at_base(artifact.graph, model)})
    if isinstance(artifact, ModelGraph) and artifact.base.sha256 == model.base.sha256:
        return artifact.model_copy(update={"base": model.base})
    return artifact


def _workplace_of(step: PlannedStep, store: Store) -> Workplace | None:
    """The other Python that a step runs in, if it does."""
    return None if step.environment is None else Workplace(step.environment, store.environments, step.python)


def _prepare(workplace: Workplace, step: PlannedStep, reporter: Reporter) -> None:
    try:
        workplace.prepare(lambda text: reporter.note(step.id, text))
    except GradmapError as error:
        error.where = f"step {step.id!r}"
        raise


def _call(
    step: PlannedStep, inputs: BaseModel, context: Context, store: Store, workplace: Workplace | None, threads: int | None
) -> BaseModel:
    """Run the stage; turn whatever goes wrong into an error that names the step."""
    where = f"step {step.id!r}"
    try:
        if workplace is None:
            with plugin_code():
                result = step.stage.run(inputs, context)
        else:
            result = run_elsewhere(step.stage, inputs, context, workplace, threads, store.log)
    except BaseException as error:
        if is_interruption(error):
            raise
        shortage = None if isinstance(error, CapacityError) else find_shortage(error)
        if shortage is not None:
            shortage_error = CapacityError(f"stage {step.stage.name!r} {shortage.explain([context.folder, *step.writes])}")
            shortage_error.where = where
            raise shortage_error from error
        if isinstance(error, GradmapError):
            failure = StageError(text_of(error)) if error.exit_code == RecipeError.exit_code else error
            failure.where = error.where or where
            raise failure from error
        told = (
            (error.error_type, error.traceback)
            if isinstance(error, WorkerCrash)
            else (type(error).__name__, traceback.format_exc())
        )
        kept = store.save_traceback(told[1])
        failure = StageError(
            f"stage {step.stage.name!r} ({step.plugin}) failed: {told[0]}: {on_one_line(error)}; traceback in {kept}"
        )
        failure.where = where
        raise failure from error
    if not isinstance(result, BaseModel) or not isinstance(result, step.stage.Outputs):
        name = name_method("run", step.stage, step.plugin)
        failure = StageError(f"{name} must return its Outputs, got {describe_value(result)}")
        failure.where = where
        raise failure
    return result


def _check_outputs(step: PlannedStep, result: BaseModel, inputs: BaseModel, folder: StepFolder) -> None:
    """Raise `StageError` where files or replaced tensors are not what they should be."""
    for fault in find_output_faults(result, inputs, folder.path, step.writes):
        failure = StageError(f"stage {step.stage.name!r}: {fault}")
        failure.where = f"step {step.id!r}"
        raise failure


def _keep(result: BaseModel, step: PlannedStep, store: Store, folder: StepFolder, key: str, record: dict[str, Any]) -> BaseModel:
    """Put outputs into the store; return them as stored."""
    try:
        if not step.code.is_current():
            raise StageError("its source files have changed while it ran, so its result is of neither code; run again")
        return store.finish(folder, key, record, result)
    except StageError as error:
        failure = StageError(f"stage {step.stage.name!r}: {error}")
        failure.where = f"step {step.id!r}"
        raise failure from error


@contextmanager
def _noticing_loss(step: PlannedStep, store: Store, folder: StepFolder) -> Iterator[None]:
    """Whatever fails because somebody has deleted the store or the step's folder: that is what is told."""
    try:
        yield
    except Exception as error:
        loss = store.find_loss(folder)
        if loss is None:
            raise
        failure = StageError(f"stage {step.stage.name!r}: {loss}")
        failure.where = f"step {step.id!r}"
        raise failure from error


@contextmanager
def _scratch_step() -> Iterator[StepFolder]:
    """A folder for what another process writes into the store."""
    with scratch_folder() as folder:
        yield StepFolder(folder, folder)


def _join(lineages: Iterator[tuple[FinishedStep, ...]]) -> tuple[FinishedStep, ...]:
    seen: dict[str, FinishedStep] = {}
    for lineage in lineages:
        seen |= {step.id: step for step in lineage}
    return tuple(seen.values())
