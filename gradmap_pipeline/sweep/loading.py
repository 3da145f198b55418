"""Tensors on disk into a model, through the conversions that transformers applies; and back to their names on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checkpoint.casts import FOR_COMPUTING, cast, is_lossy, overflow
from ..checkpoint.pretrained import read_config
from ..checkpoint.skeleton import build_skeleton, find_layer_list
from ..errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..checkpoint.graph import ModelGraph


def load_tensors(module: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> set[str]:
    """Bring tensors in under their names on disk; return the names of parameters that are missing.

    Raises `StageError` where a finite value would become infinite.
    """
    missing: set[str] = load_all(module, tensors, dtype, device).missing_keys
    return missing


def load_all(module: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> Any:
    """The same; return all that transformers says of it. Raises `ModelError` where a tensor has another shape."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    plan = module._get_dtype_plan(dtype)
    wider = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and is_lossy(tensor.dtype, dtype)}
    lost = {name: cast(tensor, dtype)[1] for name, tensor in wider.items()}
    too_large = next((name for name, infinite in lost.items() if infinite), None)
    loading, _ = convert_and_load_state_dict_in_model(
        module,
        tensors,
        LoadStateDictConfig(
            dtype=dtype,
            device_map={"": device},
            dtype_plan=plan,
            weight_mapping=get_model_conversion_mapping(module),  # type: ignore[arg-type]
        ),
    )
    if loading.mismatched_keys:
        name, found, wanted = next(iter(loading.mismatched_keys))
        raise ModelError(f"{name!r} has shape {tuple(found)} in the checkpoint, but its config asks for {tuple(wanted)}")
    if loading.conversion_errors:
        name, error = next(iter(loading.conversion_errors.items()))
        raise ModelError(f"the tensors that make {name!r} do not fit together: {str(error).strip().splitlines()[0][:200]}")
    if too_large is not None and any(part.dtype == dtype and bool(part.isinf().any()) for part in _parameters_in(module)):
        raise overflow(too_large, lost[too_large], tensors[too_large].numel(), dtype, FOR_COMPUTING)
    return loading


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
    load_tensors(module, marked, torch.float32, "cpu")
    value = layers[layer].get_parameter(parameter)
    if not value.is_meta and value.min() == value.max():
        name = names[int(value.flatten()[0])]
        if stored[name].shape == tuple(value.shape):
            return name
    raise ModelError(f"layer {layer} has a parameter {parameter!r}, which the checkpoint stores in several parts")
