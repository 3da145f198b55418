"""Context: a running stage gets its folder, device, memory and progress from it, and the units that earlier runs have finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .machine.distributed import ProcessGroup
from .metrics import Metric

if TYPE_CHECKING:
    import torch


class Advance(Protocol):
    """Count finished units of work."""

    def __call__(self, units: int = 1, /, *, detail: str = "") -> None:
        """`detail`: a figure that changes as the work goes on, in a few words."""


def count_nothing(units: int = 1, /, *, detail: str = "") -> None:
    """Count work that no bar shows: an `Advance` that does nothing."""


def compute_anew(key: Any, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Compute the tensors: `Context.remember_tensors` is this where nothing is kept."""
    return compute()


@dataclass(frozen=True)
class FinishedStep:
    """A step that led to the inputs of another."""

    id: str
    stage: str
    options: dict[str, Any]
    outputs: dict[str, Any]
    """Each artifact's JSON."""
    seconds: float | None = None
    """Seconds that the step took when its result was computed; None where they are not known."""


@dataclass(frozen=True)
class Context:
    """Everything a stage may use besides its inputs and options."""

    folder: Path
    """This step's own folder, empty at the start. Write tensors here."""
    seed: int
    device: str
    """Device as torch names it: `cpu`, `cuda:0`."""
    dtype: str
    """Floating-point type to compute in: `float32`, `bfloat16`, `float16`."""
    memory: int
    """Bytes this process may have resident, all included; on a GPU, what it may have there."""
    progress: Callable[[str, int, str], AbstractContextManager[Advance]]
    """`with context.progress(description, total, unit) as advance:` reports work that takes longer than a second.

    An empty `unit`: no rate is told, where one could be taken for the speed of the model."""
    note: Callable[[str], None]
    """Tell the user one finding, in one line."""
    remember: Callable[[Any, Callable[[], Any]], Any]
    """`context.remember(key, compute)`: the JSON value kept under this key by any earlier run of the stage, else `compute()`.

    The key must name all that the value depends on, except the stage's code, the compute dtype and library versions.
    """
    host_memory: int = 0
    """Where the device is a GPU: bytes this process may have resident in the machine; 0: nothing is kept there for the GPU."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """The processes that work on this step together; one, unless the stage is `parallel`."""
    lineage: tuple[FinishedStep, ...] = field(default=())
    """The steps that led here, in order."""
    step: str | None = None
    """Id of this step in the recipe; None where there is no recipe."""
    metrics: tuple[Metric, ...] = ()
    """What earlier steps have measured of the models that this one takes, of those they were made from, and of the unpruned one,
    where the stage has `reads_metrics`."""
    remember_tensors: Callable[[Any, Callable[[], dict[str, torch.Tensor]]], dict[str, torch.Tensor]] = compute_anew
    """This does for tensors by name what `remember` does for JSON values. Of several processes all get those of the leading one.

    They are kept until the step has finished; nowhere where there is no store beside the stage: in another Python, in a test.
    """
    keep_folder: Callable[[Any], Path] | None = None
    """`context.keep_folder(key)`: a folder that stays where a run is killed, until the step has finished; what the stage wrote
    there before under an equal key is in it. Processes that work together share it. None where `remember_tensors` keeps nothing."""
    provenance: Mapping[str, Any] | None = None
    """What a step that writes a folder says of how it is made again: the `recipe` as far as this step, and what decides its bytes.
    `make_lineage` takes it in. None where there is no recipe."""
