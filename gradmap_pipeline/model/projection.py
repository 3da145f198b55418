"""Find, by structure, the linear map through which a layer's feed-forward part writes to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import StageError
from .layerwise import LayerArguments, LayerwiseModel

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Projection:
    """A linear map inside a layer: (tokens, inputs) to (tokens, hidden)."""

    name: str
    """Of the module, inside its layer."""
    transposed: bool
    """Whether its weight is (inputs, hidden), as in GPT-2's Conv1D, instead of (hidden, inputs)."""
    inputs: int


def find_down_projection(model: LayerwiseModel, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> Projection:
    """The widest linear map of base layer `index` whose output reaches the layer's output unchanged; the last of equals.

    A map qualifies when adding a vector to its output adds exactly that vector to the layer's output. That holds
    where it writes to the residual stream directly, and fails behind a norm or a gate.
    `hidden` is (B, T, D). The layer's weights must be in.
    """
    import torch

    layer = model.module.get_submodule(f"{model.layers_path}.{index}")
    width = hidden.shape[-1]
    candidates = [projection for projection in _linear_maps(layer, hidden, model, index, arguments) if projection.inputs >= width]
    candidates.sort(key=lambda projection: projection.inputs)  # stable: the last executed of the widest comes last
    with torch.no_grad():
        plain = model.run_layer(index, hidden, arguments)
        nudge = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(plain)
        scale = plain.abs().max()
        for projection in reversed(candidates):
            written = layer.get_submodule(projection.name)
            handle = written.register_forward_hook(lambda _module, _input, output: output + nudge * scale)
            try:
                moved = model.run_layer(index, hidden, arguments)
            finally:
                handle.remove()
            tolerance = 16 * torch.finfo(plain.dtype).eps * (1 + nudge.abs().max()) * scale
            if (moved - plain - nudge * scale).abs().max() <= tolerance:
                return projection
    raise StageError(
        f"layer {index} of {type(model.module).__name__} has no linear map that writes to the residual stream unchanged "
        "(it is followed by a norm or a gate); a correction cannot be folded into it"
    )


def _linear_maps(
    layer: nn.Module, hidden: torch.Tensor, model: LayerwiseModel, index: int, arguments: LayerArguments
) -> list[Projection]:
    """Linear maps to the hidden size that the layer calls exactly once for every token, in the order it calls them."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    called: list[str] = []
    handles = []
    for name, module in layer.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):

            def listen(_module: nn.Module, _input: object, output: torch.Tensor, name: str = name) -> None:
                if output.numel() == hidden.numel() and output.shape[-1] == hidden.shape[-1]:
                    called.append(name)

            handles.append(module.register_forward_hook(listen))
    try:
        with torch.no_grad():
            model.run_layer(index, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    maps = []
    for name in called:
        if called.count(name) == 1:
            module = layer.get_submodule(name)
            transposed = isinstance(module, Conv1D)
            weight = layer.get_parameter(f"{name}.weight")
            maps.append(Projection(name, transposed, weight.shape[0 if transposed else 1]))
    return maps
