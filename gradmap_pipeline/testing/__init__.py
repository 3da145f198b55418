"""For the tests of plugin authors: run one stage alone, or check whether it keeps the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..artifacts import Artifact
from ..context import Advance, Context
from ..errors import PluginError
from ..machine.memory import default_budget
from ..metrics import Metric
from ..run.output_checks import dump_outputs
from ..stages.stage import Stage


def make_context(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    memory: int | None = None,
    notes: list[str] | None = None,
    metrics: Sequence[Metric] = (),
) -> Context:
    """A context on the CPU that keeps nothing and appends what the stage tells the user to `notes`.

    `memory`: bytes the process may have resident; None: 80 % of what is free. `metrics`: what earlier steps have measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = [] if notes is None else notes
    memory = default_budget() if memory is None else memory
    known = tuple(metrics)
    return Context(folder, seed, "cpu", dtype, memory, _silent_progress, said.append, _remember_nothing, metrics=known)


def run_stage(
    stage: Stage, folder: Path, *, seed: int = 0, dtype: str = "float32", metrics: Sequence[Metric] = (), **inputs: Artifact
) -> Any:
    """Run a stage in `folder` and return its outputs, after checking that they survive being stored.

    `metrics`: what earlier steps have measured of the inputs.

    Raises `PluginError` when the outputs are of another type, and `StageError` when they change on the way through JSON.
    """
    result = stage.run(type(stage).Inputs.model_validate(inputs), make_context(folder, seed=seed, dtype=dtype, metrics=metrics))
    if not isinstance(result, stage.Outputs):
        raise PluginError(f"stage {stage.name!r} must return its Outputs, got {type(result).__name__}")
    dump_outputs(result)
    return result


def check_stage(stage: Stage, *, seed: int = 0, dtype: str = "float32", memory: int | None = None, **inputs: Artifact) -> list[str]:
    """Run a stage twice in fresh folders and return what breaks the contract of stages, one line for each; none where it keeps it.

    Found are: other outputs the second time; changed inputs; files that are missing, in a wrong place or of another digest;
    replaced tensors of another shape or type, or not finite; files written elsewhere by Python; output on standard output; threads
    that still run; a changed state of the process; outputs that do not survive JSON; failures; more memory than given.

    `memory`: bytes the process may have resident; None: 80 % of what is free, and the peak is not looked at. Raises
    `GradmapError` where the inputs are not those that the stage takes.
    """
    from .conformance import find_breaches

    return find_breaches(stage, inputs, seed, dtype, memory)


def make_inputs(cls: type[Stage], folder: Path) -> dict[str, Any]:
    """Small inputs for a stage, made in `folder` from the built-in model by the stages that are installed.

    The model has all its layers where the stage ranks layers, or takes a ranking; else two are missing. Raises `PluginError` where
    no installed stage makes an input that is required.
    """
    from ..recipe.catalog import load_catalog
    from . import sample_inputs

    return sample_inputs.make_inputs(cls, load_catalog(), folder)


@contextmanager
def _silent_progress(description: str, total: int, unit: str) -> Iterator[Advance]:
    def advance(units: int = 1, /, *, detail: str = "") -> None:
        pass

    yield advance


def _remember_nothing(key: Any, compute: Callable[[], Any]) -> Any:
    return compute()
