"""Under what results are kept: all that they depend on, by content."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from ..artifacts import Artifact
from ..machine.accelerators import name_device
from ..machine.digests import sha256_of_value
from ..machine.distributed import ProcessGroup
from ..machine.environment import Workplace
from ..machine.machine import Machine
from ..metrics import Metric
from ..recipe.plan import PlannedStep
from .store import Store


def make_key(
    step: PlannedStep,
    inputs: dict[str, Artifact],
    seed: int,
    dtype: str,
    store: Store,
    workplace: Workplace | None = None,
    known: Sequence[Metric] = (),
    place: dict[str, Any] | None = None,
) -> str:
    """Identity of a step's result: its code, options, inputs and all else that changes it. Files count by content.

    `known`: earlier metrics that the stage reads. `place`: the machine, where the result holds for this one alone.
    """
    options = fingerprint_options(step, store)
    return sha256_of_value(
        {
            "stage": step.stage.name,
            "code": step.code.digest,
            "options": options,
            "writes": [str(folder.resolve()) for folder in step.writes],
            "inputs": {name: artifact.content() for name, artifact in inputs.items()},
            "seed": seed,
            "dtype": dtype,
            "versions": versions_of(step, workplace),
            "metrics": [metric.model_dump() for metric in known],
            **({} if place is None else {"machine": place}),
        }
    )


def fingerprint_options(step: PlannedStep, store: Store) -> dict[str, Any]:
    """JSON of a step's options by name; what has a `fingerprint` counts by its content."""
    return {name: _fingerprint(value, store) for name, value in step.stage}


def describe_machine(machine: Machine, group: ProcessGroup) -> dict[str, Any]:
    """What a measured time depends on besides the work: the device by kind and name, threads, and the system."""
    import torch

    device = machine.prepare_torch(group)
    names = {"device": device, "name": name_device(device), "processor": name_device("cpu")}
    return {**names, "threads": torch.get_num_threads(), "system": platform.platform()}


def _fingerprint(value: Any, store: Store) -> Any:
    """JSON of an option; what has a `fingerprint` counts by its content, wherever it stands."""
    if hasattr(value, "fingerprint"):
        return value.fingerprint(store.digest_of)
    if isinstance(value, BaseModel):
        return {name: _fingerprint(getattr(value, name), store) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {str(key): _fingerprint(item, store) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_fingerprint(item, store) for item in value]
    return to_jsonable_python(value)


def versions_of(step: PlannedStep, workplace: Workplace | None) -> dict[str, Any]:
    """Of what a step's results depend on, besides our code and the stage's."""
    if workplace is not None:
        return workplace.identify(step.stage.libraries)
    return {library: version_of(library) for library in step.stage.libraries}


def version_of(library: str) -> str:
    """Its version as installed; `missing` where it is not."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"
