"""What autograd joins: the input and the output of one layer for one batch, and the gradients that go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class LayerGraphs:
    """Graphs of layers by their position in the model and by batch."""

    def __init__(self, *, keep: bool) -> None:
        """`keep`: a graph may be gone through again."""
        self._keep = keep
        self._graphs: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        """A layer's input and output."""

    def has(self, position: int, batch: int) -> bool:
        """Whether the layer at a position has run for a batch with a graph that is still there."""
        return (position, batch) in self._graphs

    def run(self, position: int, batch: int, hidden: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The output (B, T, D) of a layer for the input `hidden`, with its graph kept."""
        import torch

        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = layer(leaf)
        self._graphs[position, batch] = leaf, output
        return output

    def differentiate(
        self, position: int, batch: int, gradient: torch.Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        """Gradients with respect to a layer's input (B, T, D), and to parameters: None for one that the batch does not use."""
        import torch

        place = position, batch
        leaf, output = self._graphs[place] if self._keep else self._graphs.pop(place)
        below, *others = torch.autograd.grad(output, [leaf, *parameters], gradient, retain_graph=self._keep, allow_unused=True)
        return below, others

    def drop_from(self, position: int) -> None:
        """Forget the graphs of the layer at a position and of those above it."""
        self._graphs = {place: graph for place, graph in self._graphs.items() if place[0] < position}


@contextmanager
def opened(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters, open to autograd for the time of the `with` block."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def accumulate(
    sums: dict[str, torch.Tensor],
    parameters: dict[str, nn.Parameter],
    gradients: Sequence[torch.Tensor | None],
    scale: float,
) -> None:
    """Add gradients in fp32; a parameter that a batch does not use (an expert nobody chose) adds nothing."""
    import torch

    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if name not in sums:
            sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
        if gradient is not None:
            sums[name] += gradient.float() / scale
