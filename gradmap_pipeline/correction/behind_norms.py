"""Correct a linear map that writes to the residual stream through a norm.

The norm gives every token's output the same size and scales its channels: it writes g ⊙ u, where u = y / r is what the map returns
over its own size r. A change ΔW of the map moves u by ΔW a / r, a the map's input, and then brings it back to its size. So the
correction is asked for the u' that can be reached, the one of u's size at most whose g ⊙ u' comes nearest to what should have been
written, and least squares are solved over tokens with inputs a / r and residuals g ⊙ (u' - u).

Sizes: B sequences a batch, T tokens, n tokens that are not padding, F inputs of the map, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from .sites import CapturedError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..sweep.layerwise import LayerwiseModel
    from .sites import Site

_HALVINGS = 30
_BATCH = 1024  # tokens that are computed at a time


class Normed(NamedTuple):
    """A batch as a linear map took it, and as the norm behind it sees what the map returned."""

    taken: torch.Tensor
    """(B, T, F)"""
    unit: torch.Tensor
    """u, (B, T, D): what the norm multiplies by its scale."""
    size: torch.Tensor
    """r, (B, T, 1): u times r is what the map returned, less its mean where the norm takes that off."""


@contextmanager
def capture_behind_norm(model: LayerwiseModel, layer: int, site: Site, *, leave: bool = False) -> Iterator[list[Normed]]:
    """Collect, each time a layer runs, what the map of a site takes and what its norm makes of what it returns.

    `leave`: go no further in the layer, but raise an error that `run_to_site` expects.
    """
    captured: list[Normed] = []
    taken: list[torch.Tensor] = []
    module = model.module.get_submodule(f"{model.layers_path}.{layer}")
    linear, norm = module.get_submodule(site.name), module.get_submodule(site.norm)

    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        taken.append(inputs[0])

    def listen(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        y = inputs[0].float()
        unit = apply_unscaled(norm, inputs[0]).float()
        size = (y * unit).sum(-1, keepdim=True) / unit.square().sum(-1, keepdim=True).clamp_min(1e-30)
        captured.append(Normed(taken.pop().reshape(*output.shape[:-1], -1), unit, size))
        if leave:
            raise CapturedError

    handles = [linear.register_forward_pre_hook(keep), norm.register_forward_hook(listen)]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def scale_behind(layer: nn.Module, site: Site) -> torch.Tensor:
    """g (D,), fp64: what the norm of a site multiplies by, with the gain of what it returns."""
    return (layer.get_parameter(f"{site.norm}.weight").detach().double() + site.norm_offset) * site.gain


def make_equations(
    normed: Normed, mask: torch.Tensor, missing: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (n, F), and R (n, D) in fp64. With A X = R, the change ΔW = (X / g)ᵀ of the map makes up for all that it can.

    `mask` (B, T), `missing` (n, D), `scale` (D,).
    """
    import torch

    taken, unit, size = (values[mask] for values in normed)
    inputs = torch.where(size > 0, taken / size, 0)
    reachable = [
        scale * (nearest_of_size(scale, scale * u + m, u.norm(dim=-1, keepdim=True)) - u)
        for u, m in zip(unit.double().split(_BATCH), missing.double().split(_BATCH), strict=True)
    ]
    return inputs, torch.cat(reachable)


def nearest_of_size(scale: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """v (n, D), ‖v‖ ≤ size, for which ‖g ⊙ v - wanted‖ is least: v = g ⊙ wanted / (g² + μ), with the least μ ≥ 0 that does.

    `scale` g is (D,), `wanted` (n, D), `size` (n, 1). ‖v‖ falls as μ rises, and is at most `size` at ‖g ⊙ wanted‖ / size.
    Source: least squares on a ball, Golub and Van Loan, Matrix Computations, section 6.2.1 (fourth edition).
    """
    import torch

    along, square = scale * wanted, scale.square().clamp_min(1e-300)
    low = torch.zeros_like(size)
    high = along.norm(dim=-1, keepdim=True) / size.clamp_min(1e-300)
    is_inside = (along / square).norm(dim=-1, keepdim=True) <= size
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_long = (along / (square + middle)).norm(dim=-1, keepdim=True) > size
        low, high = torch.where(is_long, middle, low), torch.where(is_long, high, middle)
    return along / (square + torch.where(is_inside, 0, high))


def apply_unscaled(norm: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Return f(1) - f(0), f(weight) a norm's output: what its scale multiplies, whatever it adds to its weight and shifts by."""
    import torch

    weight = norm.get_parameter("weight")
    before = weight.data
    try:
        weight.data = torch.ones_like(before)
        with_ones = norm.forward(*inputs)
        weight.data = torch.zeros_like(before)
        return with_ones - norm.forward(*inputs)  # type: ignore[no-any-return]
    finally:
        weight.data = before
