"""Casts between floating-point types that make no infinity of a finite number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import StageError

if TYPE_CHECKING:
    import torch

FOR_COMPUTING = "use --dtype {wider}"
FOR_WRITING = "set 'dtype' under 'model' to {wider}"
_WIDER = {"float16": "float32 or bfloat16", "bfloat16": "float32"}


def is_lossy(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a finite number of one type can be infinite in the other."""
    import torch

    return torch.finfo(target).max < torch.finfo(source).max


def cast(values: torch.Tensor, target: torch.dtype) -> tuple[torch.Tensor, int]:
    """Values in another floating-point type, and how many finite ones are infinite there."""
    made = values.to(target)
    if not is_lossy(values.dtype, target):
        return made, 0
    infinite = made.isinf()
    return made, int((infinite & values.isfinite()).sum()) if bool(infinite.any()) else 0


def cast_all(values: torch.Tensor, target: torch.dtype, name: str, remedy: str) -> torch.Tensor:
    """The same as `cast`. Raises `StageError` where a finite number would be infinite; `name` is the tensor's."""
    made, lost = cast(values, target)
    if lost:
        raise overflow(name, lost, values.numel(), target, remedy)
    return made


def overflow(name: str, lost: int, elements: int, target: torch.dtype, remedy: str) -> StageError:
    """The refusal of a tensor of which `lost` elements would be infinite in another type. `remedy`: what to do."""
    import torch

    dtype = str(target).removeprefix("torch.")
    wider = _WIDER.get(dtype)
    advice = remedy.format(wider=wider) if wider else "scale the weights down in the checkpoint; no wider type is computed in"
    return StageError(
        f"{lost:,} of the {elements:,} values of {name!r} do not fit into {dtype}, whose largest number is "
        f"{torch.finfo(target).max:.4g}: they would become infinite; {advice}"
    )
