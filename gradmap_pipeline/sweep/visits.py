"""What a sweep shows at each layer, batch by batch.

Sizes: B sequences a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ForwardVisit:
    """One batch at one layer of a forward sweep."""

    input: torch.Tensor
    """(B, T, D)"""
    output: torch.Tensor
    """(B, T, D)"""
    mask: torch.Tensor
    """bool (B, T), False where padded."""
    batch: int


@dataclass(frozen=True)
class BackwardVisit(ForwardVisit):
    """One batch at one layer of a backward sweep."""

    gradient: torch.Tensor
    """Gradient of the mean loss over all batches, with respect to the layer's output (B, T, D)."""


@dataclass
class ForwardLayer:
    """One layer of a forward sweep; iterating runs its batches."""

    layer: int
    """Number of the layer in the base model."""
    module: nn.Module
    """The layer, with its weights as long as the sweep stands at it."""
    visits: Iterator[ForwardVisit]

    def __iter__(self) -> Iterator[ForwardVisit]:
        return self.visits


@dataclass
class BackwardLayer:
    """One layer of a backward sweep; iterating runs its batches."""

    layer: int
    """Number of the layer in the base model."""
    module: nn.Module
    visits: Iterator[BackwardVisit]
    weight_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """fp32, by parameter; complete after the last batch. Empty unless the sweep computes them."""

    def __iter__(self) -> Iterator[BackwardVisit]:
        return self.visits
