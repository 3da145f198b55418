"""Run one stage and keep what it gives; whatever goes wrong is told with the step, the stage and its plugin."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from .. import API_VERSION
from ..context import Context
from ..errors import CapacityError, GradmapError, RecipeError, StageError, describe_value, on_one_line, text_of
from ..interruptions import is_interruption
from ..machine.atomic_folder import scratch_folder
from ..machine.environment import Workplace
from ..machine.memory_advice import tell_shortage
from ..machine.shortages import find_shortage
from ..machine.streams import plugin_code
from ..recipe.asking import name_method
from ..recipe.plan import PlannedStep
from ..recipe.plugin_contract import explain_lack
from .isolation import WorkerCrash, run_elsewhere
from .output_checks import find_output_faults
from .store import StepFolder, Store


def call_stage(
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
        if isinstance(error, CapacityError) and error.by_option:
            error.args = (tell_shortage(error, type(step.stage).model_fields),)
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
        why = explain_lack(error, API_VERSION) or f"{told[0]}: {on_one_line(error)}"
        failure = StageError(f"stage {step.stage.name!r} ({step.plugin}) failed: {why}; traceback in {kept}")
        failure.where = where
        raise failure from error
    if not isinstance(result, BaseModel) or not isinstance(result, step.stage.Outputs):
        name = name_method("run", step.stage, step.plugin)
        failure = StageError(f"{name} must return its Outputs, got {describe_value(result)}")
        failure.where = where
        raise failure
    return result


def check_outputs(step: PlannedStep, result: BaseModel, inputs: BaseModel, folder: StepFolder) -> None:
    """Raise `StageError` where files or replaced tensors are not what they should be."""
    for fault in find_output_faults(result, inputs, folder.path, step.writes):
        failure = StageError(f"stage {step.stage.name!r}: {fault}")
        failure.where = f"step {step.id!r}"
        raise failure


def keep_outputs(
    result: BaseModel, step: PlannedStep, store: Store, folder: StepFolder, key: str, record: dict[str, Any]
) -> BaseModel:
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
def noticing_loss(step: PlannedStep, store: Store, folder: StepFolder) -> Iterator[None]:
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
def scratch_step() -> Iterator[StepFolder]:
    """A folder for what another process writes into the store."""
    with scratch_folder() as folder:
        yield StepFolder(folder, folder)
