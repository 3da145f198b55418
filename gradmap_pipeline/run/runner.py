"""Run a plan: take each step from the store, or run it and put it there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..artifacts import Artifact
from ..checkpoint.graph import ModelGraph, open_model
from ..checkpoint.model import Model
from ..context import FinishedStep
from ..cost.narrow_types import tell_slow_type
from ..errors import QualityError, StageError
from ..export.exports import Export
from ..export.folders import list_options
from ..machine.distributed import ProcessGroup
from ..machine.machine import ALONE, Machine
from ..machine.memory import give_back, tune_allocator
from ..metrics import Metric
from ..recipe.plan import Plan, PlannedStep
from .determinism import verify_step
from .events import Place, Reporter, RunFinished, RunStarted, StepFinished, StepStarted
from .inspection import inspect_steps, measure_room
from .keys import describe_machine, make_key
from .limits import check_limits, raise_missed
from .listening import heard
from .measured import Measured, read_metrics
from .provenance import describe_step
from .record import describe_place
from .recording import Recorder, recording
from .replay import make_replay
from .stage_call import keep_outputs, noticing_loss, scratch_step
from .step_errors import naming, naming_unforeseen
from .step_run import StepCall
from .store import Store
from .summary import summarise
from .workplaces import prepare_workplace, workplace_of


@dataclass
class RunState:
    """Where a run stands."""

    outputs: dict[str, dict[str, Artifact]] = field(default_factory=dict)
    """Artifacts by step id, then output name."""
    lineage: dict[str, tuple[FinishedStep, ...]] = field(default_factory=dict)
    """The steps that led to each step, itself last, by step id."""
    finished: list[StepFinished] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    """Metrics that the steps have given, in order."""
    is_inspected: bool = False
    """Whether the stages of all steps that are to run have looked at the model."""
    heard: set[str] = field(default_factory=set)
    """What libraries have said, and was told."""
    is_verified: bool = False
    """Whether each step is run once more, and what it gives compared."""
    place: Place | None = None
    """Where the run computes; None as long as it has not."""
    keys: dict[str, str] = field(default_factory=dict)
    """In the store, by step id."""
    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What decides the bytes of each step, by id, as `describe_step` gives it."""
    answers: dict[str, Any] = field(default_factory=dict)
    """The answers of `StructureProbe` about the model, by question."""


def run_plan(
    plan: Plan,
    store: Store,
    machine: Machine,
    reporter: Reporter,
    group: ProcessGroup = ALONE,
    *,
    is_recorded: bool = False,
    is_verified: bool = False,
) -> RunState:
    """Run every step in order; what the store holds is not run again.

    All processes of a group go through the plan; the leading one alone writes into the store and decides what is in it.
    `is_recorded`: keep there what the run came to, and how it ended. `is_verified`: run each step once more, and raise
    `DifferenceError` where it gives something else.
    """
    for step in plan.steps:
        _ = step.code.digest  # of the code that is about to run, whatever is edited meanwhile
    tune_allocator(is_tight=machine.memory is not None)
    if machine.device.startswith("cuda"):
        machine.prepare_torch(group)  # says at once that there is no such device
    is_complete = False
    try:
        if group.leads:
            store.prepare(plan.recipe_path, [step.stage.name for step in plan.steps])
        with recording(plan, store, machine, reporter, is_wanted=is_recorded and group.leads) as recorder:
            state = _run_steps(plan, store, machine, reporter, group, recorder, is_verified)
        is_complete = True
        return state
    finally:
        store.close(is_complete=is_complete)


def _run_steps(
    plan: Plan,
    store: Store,
    machine: Machine,
    reporter: Reporter,
    group: ProcessGroup,
    recorder: Recorder | None,
    is_verified: bool,
) -> RunState:
    started = time.monotonic()
    group.agree_on("recipes", json.dumps([[step.id, step.stage.name, step.stage.model_dump(mode="json")] for step in plan.steps]))
    if group.leads:
        reporter.run_started(RunStarted(recipe=str(plan.recipe_path), steps=[step.id for step in plan.steps]))
        base = open_model(plan.model, store.digest_of)
        group.tell("the model's digest is known")
    else:
        group.tell(None)
        base = open_model(plan.model, store.digest_of)
    group.agree_on("models", base.digest)
    state = RunState(outputs={"model": {"model": base}}, lineage={"model": ()}, is_verified=is_verified)
    if recorder is not None:
        recorder.state = state

    def finish() -> RunFinished:
        tables = summarise(state.outputs, state.measured, state.finished)
        return RunFinished(seconds=time.monotonic() - started, summary=tables)

    try:
        for step in plan.steps:
            with naming_unforeseen(step):
                _run_step(step, plan, store, machine, reporter, state, group)
    except QualityError:
        reporter.run_stopped(finish())
        raise
    reporter.run_finished(finish())
    return state


def _run_step(
    step: PlannedStep, plan: Plan, store: Store, machine: Machine, reporter: Reporter, state: RunState, group: ProcessGroup
) -> None:
    name, started = step.stage.name, time.monotonic()
    reporter.step_started(StepStarted(step=step.id, stage=name))
    for notice in step.notices:
        reporter.note(step.id, notice)
    inputs = _find_inputs(step, state)
    known = _find_known(step, inputs, state)
    sources = [source for source, _ in step.inputs.values()] + [one.step for one in known]
    lineage = _join(state.lineage[source] for source in sources)
    parts = (plan, store, machine, reporter, state, group)
    if group.leads:
        state.described[step.id] = describe_step(step, store)
    outputs, key, cached = _get_outputs(step, inputs, [one.metric for one in known], lineage, *parts)
    state.outputs[step.id], state.keys[step.id] = outputs, key
    options = list_options(step.stage)
    seconds = store.seconds_of(name, key)
    this = FinishedStep(step.id, name, options, {output: artifact.content() for output, artifact in outputs.items()}, seconds)
    state.lineage[step.id] = (*lineage, this)
    with naming(step):
        metrics = read_metrics(outputs)
    state.measured += [Measured(step.id, metric) for metric in metrics]
    base = state.outputs["model"]["model"]
    whole = [metric for metric in metrics if metric.is_reference and metric.model == base.digest]
    if not whole and step.measured is not None and any(limit.is_relative for limit in step.limits.values()):
        others, _, _ = _get_outputs(step, {**inputs, step.measured: base}, [], lineage, *parts)
        whole = [metric for metric in read_metrics(others) if metric.model == base.digest]
        state.measured += [Measured(step.id, metric) for metric in whole]
    with naming(step):
        limits = check_limits([metric for metric in metrics if not metric.is_reference], step.limits, whole)
    finished = StepFinished(
        step=step.id,
        stage=name,
        cached=cached,
        seconds=time.monotonic() - started,
        computed_seconds=seconds,
        outputs={output: artifact.model_dump(mode="json") for output, artifact in outputs.items()},
        metrics=metrics,
        limits=limits,
        peak_bytes=store.peak_of(name, key),
        key=key,
        folder=str(store.folder_of(name, key).resolve()),
    )
    state.finished.append(finished)
    reporter.step_finished(finished)
    with naming(step):
        raise_missed(limits)


def _get_outputs(
    step: PlannedStep,
    inputs: dict[str, Artifact],
    known: Sequence[Metric],
    lineage: tuple[FinishedStep, ...],
    plan: Plan,
    store: Store,
    machine: Machine,
    reporter: Reporter,
    state: RunState,
    group: ProcessGroup,
) -> tuple[dict[str, Artifact], str, bool]:
    """What a step gives for these inputs, its key in the store, and whether it was there. `known`: earlier metrics."""
    name = step.stage.name
    workplace = workplace_of(step, store)
    place = describe_machine(machine, group) if step.stage.machine_bound else None
    key = make_key(step, inputs, plan.seed, machine.dtype, store, workplace, known, place)
    group.agree_on(f"options, inputs or code of step {step.id!r}", key)
    result = store.load(name, key, step.stage.Outputs)
    cached: bool = group.tell(result is not None)
    together = group if step.stage.parallel and workplace is None else ALONE  # in another Python one process runs
    is_here = group.leads or together is group
    if not (cached or state.is_inspected) or state.is_verified:
        _prepare_computing(step, plan, store, machine, reporter, state, group)
    provenance = make_replay(step, plan, machine, state) if step.writes and group.leads and state.place else None
    call = StepCall(step, inputs, known, lineage, plan, store, machine, reporter, workplace, together, state.heard, provenance)
    if not cached:
        if is_here:
            with store.step(name, key) if group.leads else scratch_step() as folder, noticing_loss(step, store, folder):
                result, record, drop_units = call.run(folder, is_leading=group.leads)
                if group.leads:
                    result = keep_outputs(result, step, store, folder, key, record)
                    drop_units()
            give_back(between_steps=True)
        group.tell("the result is in the store")
    if not group.leads:
        result = store.load(name, key, step.stage.Outputs)
    if result is None:
        raise StageError(f"the result of step {step.id!r} is not in {str(store.root)!r}; all processes must share that folder")
    if state.is_verified and is_here:
        verify_step(call, result, is_leading=group.leads)
    base = state.outputs["model"]["model"]
    given = {output: getattr(result, output) for output in type(result).model_fields}
    made = {output: artifact.with_names_of(step.stage) for output, artifact in given.items() if artifact is not None}
    return {output: _at_base(artifact, base) for output, artifact in made.items()}, key, cached


def _prepare_computing(
    step: PlannedStep, plan: Plan, store: Store, machine: Machine, reporter: Reporter, state: RunState, group: ProcessGroup
) -> None:
    """Before the first step that is computed: say where, have all steps from it on look at the model, make their Pythons."""
    if state.is_inspected:
        return
    state.place = describe_place(plan, store, machine, group)
    reporter.computing(state.place)
    if group.leads and (slow := tell_slow_type(state.place.device, machine.dtype)) is not None:
        reporter.note(step.id, slow)
    rest = plan.steps[plan.steps.index(step) :]
    memory, room = group.least(machine.budget("cpu", group)), measure_room(machine, group)
    with heard(lambda text: reporter.note(step.id, text), state.heard):
        inspect_steps(rest, state.outputs["model"]["model"], memory, room, state.answers)  # type: ignore[arg-type]
    for later in rest:
        if group.leads and (place := workplace_of(later, store)) is not None:
            prepare_workplace(place, later, reporter)
    state.is_inspected = True


def _find_known(step: PlannedStep, inputs: Mapping[str, Artifact], state: RunState) -> list[Measured]:
    """What earlier steps have measured of the models that a step takes and of the unpruned one, for stages that want to know."""
    if not step.stage.reads_metrics:
        return []
    models = [artifact for artifact in inputs.values() if isinstance(artifact, Model | Export)]
    digests = {form.digest for model in models for form in (model, model.graph, model.graph.dense)}
    return [one for one in state.measured if one.metric.model in digests]


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


def _join(lineages: Iterator[tuple[FinishedStep, ...]]) -> tuple[FinishedStep, ...]:
    seen: dict[str, FinishedStep] = {}
    for lineage in lineages:
        seen |= {step.id: step for step in lineage}
    return tuple(seen.values())
