"""Adam in fp32 and in place, which holds two moments and one more tensor of the largest size.

Source: https://arxiv.org/abs/1412.6980, algorithm 1. That of torch brings its compiler into memory, which no plan counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BETAS = 0.9, 0.999
_EPSILON = 1e-12
_NAMES = "mean", "square"


class Adam:
    """Steps of weights by name, all fp32, each with a learning rate of its own."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        import torch

        self._weights = weights
        self._moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
        self._steps = 0

    def list_state(self) -> dict[str, torch.Tensor]:
        """Both moments of each weight by name, as they are."""
        moments = ((name, zip(_NAMES, both, strict=True)) for name, both in self._moments.items())
        return {f"{name} {which}": moment for name, both in moments for which, moment in both}

    def restore(self, fill: Callable[[str, torch.Tensor], object], steps: int) -> None:
        """Go on after so many steps, with the moments that `fill` writes by their names in `list_state`."""
        self._steps = steps
        for name, moment in self.list_state().items():
            fill(name, moment)

    def step(self, gradients: Mapping[str, torch.Tensor], rates: Mapping[str, float]) -> None:
        """w ← w - rate · m̂ / (√v̂ + ε), with the means m̂ of gradients and v̂ of their squares, each freed of its start at 0."""
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in _BETAS)
        for name, weight in self._weights.items():
            mean, square = self._moments[name]
            mean.lerp_(gradients[name], 1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(gradients[name], gradients[name], value=1 - _BETAS[1])
            spread = (square / second).sqrt_().add_(_EPSILON)
            weight.addcdiv_(mean, spread, value=-rates[name] / first)
