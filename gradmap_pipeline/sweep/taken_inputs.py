"""What a linear map took of all tokens, kept until its layer is done, so that its weight can change without another run.

Sizes: B sequences a batch, T tokens, F inputs of the map, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .kept_tensors import TAKEN, KeptTensors

if TYPE_CHECKING:
    import torch

    from ..batches import Batch


class TakenInputs:
    """Inputs of one linear map, batch by batch."""

    def __init__(self, kept: KeptTensors, batches: Sequence[Batch]) -> None:
        """`kept`: what they are kept with, and the hidden states that they change."""
        self._kept, self._batches = kept, batches

    def __bool__(self) -> bool:
        """Whether any are kept."""
        return self._kept.has(TAKEN, 0)

    def has_room(self, inputs: int, width: int, dtype: torch.dtype) -> bool:
        """Whether those of a map with so many inputs, and what leaves its layer, can be held beside what is kept already."""
        tokens = sum(batch.input_ids.numel() for batch in self._batches)
        return self._kept.has_room(tokens * (inputs + width) * dtype.itemsize)

    def keep(self, batch: int, taken: torch.Tensor) -> None:
        """(B, T, F), times the factor with which what the map returns arrives in the residual stream."""
        self._kept.put(TAKEN, batch, taken)

    def add_change(self, level: int, change: torch.Tensor) -> None:
        """Add to the hidden states at a level what a change of the map's weight (F, D) adds, and forget the inputs."""
        for index in range(len(self._batches)):
            hidden = self._kept.get(level, index)
            self._kept.put(level, index, hidden + self._kept.get(TAKEN, index) @ change.to(hidden))
        self._kept.drop(TAKEN)
