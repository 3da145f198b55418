"""A model that runs layer by layer with made-up weights: no tensor of the checkpoint is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checkpoint import StoredTensor
from .layerwise import LayerwiseModel

if TYPE_CHECKING:
    import torch
    from torch import nn


class HollowModel(LayerwiseModel):
    """Every tensor is zero until `make_up` fills it."""

    def read(self, stored: StoredTensor, cast: torch.dtype | None, *, pinned: bool = False) -> torch.Tensor:
        """Zeros; memory that nobody touches."""
        import torch

        if stored.is_float:
            return torch.zeros(stored.shape, dtype=cast or getattr(torch, stored.torch_dtype))
        return torch.zeros(stored.shape, dtype=torch.long)  # an index, if anything


def make_up(module: nn.Module, width: float = 0.02) -> None:
    """Fill weights that are there with small numbers, different ones, so that experts are chosen evenly."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_meta:
                parameter.uniform_(-width, width)
