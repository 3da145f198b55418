"""A model of transformers without weights: its modules on the meta device, and where its layers are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..machine.shortages import is_shortage
from .adapter import compute_buffers
from .choices import find_unknown_name
from .pretrained import make_model, name_error
from .sizes import Room

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from .checkpoint import StoredTensor


def build_skeleton(
    config: PretrainedConfig,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """The causal LM of a config. Weights are on the meta device; buffers that no checkpoint holds are computed.

    `tensors`: of its checkpoint. Raises `ModelError` as soon as the model has much more than they hold.
    """
    import torch

    try:
        with torch.device("meta"), _within(Room.of(tensors)):
            model = make_model(config, dtype or torch.float32).eval()
        for name, buffer in list(model.named_non_persistent_buffers()):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device=device)
        for module in model.modules():
            for leaf, value in module._parameters.items():
                if value is not None and not value.is_meta:  # made in a way that the context does not see
                    module._parameters[leaf] = torch.nn.Parameter(torch.empty_like(value, device="meta"))
        compute_buffers(model)
    except Exception as error:  # an architecture's own code, given numbers that nobody has tried
        if isinstance(error, ModelError) or is_shortage(error):
            raise
        unknown = find_unknown_name(config.to_dict())
        if isinstance(error, KeyError) and unknown is not None and error.args == (unknown.value,):
            raise ModelError(f"transformers cannot build this model: {unknown}") from error
        raise ModelError(f"transformers cannot build this model: {name_error(error)}") from error
    built: PreTrainedModel = model
    return built


@contextmanager
def _within(room: Room) -> Iterator[None]:
    """Raise `ModelError` where more modules are made than a checkpoint has tensors for.

    A weight that is tied to another is registered in both places, and counts once.
    """
    from torch.nn.modules import module as hooks

    seen: dict[int, Any] = {}
    elements = size = 0

    def refuse(made: str) -> ModelError:
        return ModelError(f"the config makes a model {made}; its numbers do not fit the weights beside it")

    def count_parameter(_: nn.Module, name: str, parameter: Any) -> None:
        nonlocal elements
        if parameter is not None and id(parameter) not in seen:
            seen[id(parameter)] = parameter
            elements += parameter.numel()
            if len(seen) > room.parameters or elements > room.elements:
                raise refuse(f"of over {elements:,} parameters (at {name!r}), more than twice what the checkpoint holds")

    def count_buffer(_: nn.Module, name: str, buffer: Any) -> None:
        nonlocal size
        if buffer is not None:
            size += buffer.numel() * buffer.element_size()
            if size > room.buffer_bytes:
                raise refuse(f"with buffers of over {size / 2**30:.1f} GiB (at {name!r})")

    handles = [
        hooks.register_module_parameter_registration_hook(count_parameter),
        hooks.register_module_buffer_registration_hook(count_buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_layer_list(module: PreTrainedModel, depth: int, layer_prefix: str, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The one list of decoder layers, and its name: as long as the model is deep, and named as on disk; at `path`, if given."""
    from torch import nn

    leaf = layer_prefix.rpartition(".")[2]
    candidates = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList)
        and len(child) == depth
        and name.rpartition(".")[2] == leaf
        and (path is None or name == path)
    ]
    if len(candidates) != 1:
        raise ModelError(
            f"{type(module).__name__} has {len(candidates)} lists of {depth} layers named {leaf!r}; "
            "a model whose layers form one list is needed"
        )
    return candidates[0]
