"""Where a model that runs layer by layer gets its weights: from its checkpoint, or made up, so that no tensor is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..checkpoint.checkpoint import StoredTensor, load_rounded

if TYPE_CHECKING:
    import torch
    from torch import nn


class WeightSource(Protocol):
    """What gives a tensor its values."""

    def read(self, stored: StoredTensor, cast: torch.dtype | None, *, pinned: bool = False) -> torch.Tensor:
        """A tensor of the checkpoint's shape. `cast`: the type to compute in; None: the type that it is stored in."""

    def finish(self, layer: nn.Module) -> None:
        """Change a layer whose tensors are in."""


class StoredWeights:
    """The checkpoint's own, rounded to the type in which they are exported before they get the type to compute in."""

    def __init__(self, exported: str | None) -> None:
        self._exported = exported

    def read(self, stored: StoredTensor, cast: torch.dtype | None, *, pinned: bool = False) -> torch.Tensor:
        return load_rounded(stored, self._exported, cast, pinned=pinned)

    def finish(self, layer: nn.Module) -> None:
        """Nothing is left to do."""


class ZeroWeights:
    """Zeros, in memory that nobody touches until `make_up` fills it."""

    def read(self, stored: StoredTensor, cast: torch.dtype | None, *, pinned: bool = False) -> torch.Tensor:
        import torch

        return torch.zeros(stored.shape, dtype=_type_of(stored, cast))

    def finish(self, layer: nn.Module) -> None:
        """Nothing is left to do."""


class RandomWeights:
    """One zero shown at every place, which takes no memory; a layer that is in has random weights.

    Those are large enough that nothing the layer does is lost in rounding.
    """

    def read(self, stored: StoredTensor, cast: torch.dtype | None, *, pinned: bool = False) -> torch.Tensor:
        import torch

        return torch.zeros((), dtype=_type_of(stored, cast)).expand(stored.shape)

    def finish(self, layer: nn.Module) -> None:
        make_up(layer, 0.2)


def _type_of(stored: StoredTensor, cast: torch.dtype | None) -> torch.dtype:
    import torch

    if not stored.is_float:
        return torch.long  # an index
    dtype: torch.dtype = cast or getattr(torch, stored.torch_dtype)
    return dtype


def make_up(module: nn.Module, width: float = 0.02) -> None:
    """Fill weights that are there with small numbers, different ones, so that experts are chosen evenly."""
    import torch

    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if name not in part._non_persistent_buffers_set and buffer.is_floating_point() and not buffer.is_meta:
                    part._buffers[name] = torch.ones_like(buffer)  # a number that scales an output: as if it did not
        for parameter in module.parameters():
            if not parameter.is_meta:
                if not parameter.is_contiguous():
                    parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                if parameter.device not in generators:
                    generators[parameter.device] = torch.Generator(parameter.device).manual_seed(0)
                parameter.uniform_(-width, width, generator=generators[parameter.device])
