"""Whether the tensors of a checkpoint are those that its config makes, before any work starts. No tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..checkpoint import adapter
from ..checkpoint.checkpoint import StoredTensor
from ..checkpoint.source import load_config
from ..errors import ModelError
from .weight_loader import drop_weights

if TYPE_CHECKING:
    from torch import nn

    from .layerwise import LayerwiseModel


def check_tensors(model: LayerwiseModel, fits: Callable[[int], bool]) -> None:
    """Raise `ModelError` where a tensor is missing, left over, of another shape, or of integers in the place of weights.

    Where names on disk are not those of modules, one layer of each kind is loaded; `fits` says whether that may be done.
    """
    _check_others(model)
    tried: set[object] = set()
    for index in model.graph.layers:
        layer = model.module.get_submodule(f"{model.layers_path}.{index}")
        stored_by_tail, unnamed = _compare(model, index, layer)
        own = tuple((tail, value.shape) for tail, value in layer.named_parameters())
        signature = (own, tuple((tail, stored.shape, stored.is_float) for tail, stored in stored_by_tail.items()))
        if signature not in tried and unnamed and fits(index):
            _try_layer(model, index, layer)
        tried.add(signature)


def _check_others(model: LayerwiseModel) -> None:
    """The tensors that belong to no layer. A model with more parts than the text decoder has some that are not for it."""
    others = model.graph.other_tensors()
    named = dict(model.module.named_parameters())
    start = adapter.prefix_on_disk(model.module)
    for name, stored in others.items():
        if not stored.is_float and (name in named or start + name in named):
            raise _refuse_type(name, stored)
    if not isinstance(load_config(model.graph.base.folder).get("text_config"), dict):
        loading = model.weights.try_load(others)
        adapter.tie_weights(model.module, loading.missing)
        _check_left_over(model, loading)


def _compare(model: LayerwiseModel, index: int, layer: nn.Module) -> tuple[dict[str, StoredTensor], bool]:
    """Tensors of a layer by their name in it, and whether some of them or of its parameters are not found by name alone."""
    start = f"{model.graph.base.layer_prefix}.{index}."
    stored_by_tail = {name[len(start) :]: stored for name, stored in model.graph.layer_tensors(index).items()}
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    for tail, stored in stored_by_tail.items():
        if tail in parameters:
            if not stored.is_float:
                raise _refuse_type(start + tail, stored)
            if stored.shape != tuple(parameters[tail].shape):
                raise ModelError(
                    f"{start + tail!r} has shape {stored.shape} in the checkpoint, but its config requires "
                    f"{tuple(parameters[tail].shape)}"
                )
    return stored_by_tail, not (parameters.keys() <= stored_by_tail.keys() <= parameters.keys() | buffers.keys())


def _try_layer(model: LayerwiseModel, index: int, layer: nn.Module) -> None:
    """Load a layer of zeros through the conversions of transformers."""
    stored = model.graph.layer_tensors(index)
    integers = [name for name, tensor in stored.items() if not tensor.is_float]
    drop_weights(layer)
    try:
        loading = model.weights.try_load({name: tensor for name, tensor in stored.items() if tensor.is_float})
        missing = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
    finally:
        drop_weights(layer)
    prefix = f"{model.layers_path}.{index}."
    if missing and not adapter.is_tied(model.module, prefix + missing[0]):
        if integers:
            raise _refuse_type(integers[0], stored[integers[0]])
        raise ModelError(f"{str(model.graph.base.folder)!r} lacks the weights of {prefix + missing[0]!r}")
    _check_left_over(model, loading)


def _check_left_over(model: LayerwiseModel, loading: adapter.Loading) -> None:
    left_over = loading.find_left_over(model.module)
    if left_over:
        raise ModelError(
            f"the checkpoint has {min(left_over)!r}, for which a {type(model.module).__name__} of its config has no place"
        )


def _refuse_type(name: str, stored: StoredTensor) -> ModelError:
    return ModelError(
        f"{name!r} holds integers ({stored.dtype}) where the model has weights; prune a checkpoint that is not quantised"
    )
