"""Tensors on disk into a model, none of them infinite that was finite; and parameters back to their names on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ..errors import ModelError
from .adapter import LateTensor, Loading, load_tensors
from .casts import FOR_COMPUTING, cast, is_lossy, overflow
from .pretrained import read_config
from .skeleton import build_skeleton, find_layer_list

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .graph import ModelGraph


def load_checked(
    module: PreTrainedModel, reads: Mapping[str, Callable[[], torch.Tensor]], dtype: torch.dtype, device: str
) -> Loading:
    """Bring tensors in, each read when its parameter takes it.

    Raises `StageError` where a finite value would become infinite.
    """
    lost: dict[str, tuple[int, int]] = {}

    def read(name: str) -> torch.Tensor:
        tensor = reads[name]()
        if tensor.is_floating_point() and is_lossy(tensor.dtype, dtype):
            infinite = cast(tensor, dtype)[1]
            if infinite:
                lost[name] = infinite, tensor.numel()
        return tensor

    loading = load_tensors(module, {name: LateTensor(partial(read, name)) for name in reads}, dtype, device)
    if lost and any(part.dtype == dtype and bool(part.isinf().any()) for part in _parameters_in(module)):
        name, (infinite, elements) = next(iter(lost.items()))
        raise overflow(name, infinite, elements, dtype, FOR_COMPUTING)
    return loading


def hold(tensors: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """Tensors that are in memory already, as `load_checked` reads them."""
    return {name: partial(_same, tensor) for name, tensor in tensors.items()}


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _parameters_in(module: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter for parameter in module.parameters() if not parameter.is_meta]


def trace_disk_name(graph: ModelGraph, layer: int, parameter: str) -> str:
    """Name in the base checkpoint of a parameter of a base layer that the model names otherwise.

    Every tensor of the layer is filled with a number of its own and loaded; the number that arrives in the parameter tells
    which tensor it comes from. Raises `ModelError` where it is made of several.
    """
    import torch

    stored = graph.layer_tensors(layer)
    names = list(stored)
    marked = {name: torch.full(stored[name].shape, float(number)) for number, name in enumerate(names)}
    module = build_skeleton(read_config(graph.base.folder), graph.base.tensors)
    _, layers = find_layer_list(module, graph.base.layers, graph.base.layer_prefix)
    load_checked(module, hold(marked), torch.float32, "cpu")
    value = layers[layer].get_parameter(parameter)
    if not value.is_meta and value.min() == value.max():
        name = names[int(value.flatten()[0])]
        if stored[name].shape == tuple(value.shape):
            return name
    raise ModelError(f"layer {layer} has a parameter {parameter!r}, which the checkpoint stores in several parts")
