"""Whether the layers of a pruned model are those of the original: the same modules, shapes and settings, by comparison.

Rules about config fields (`depth`) may miss what an architecture makes of a layer's index. Both models are built without
weights, and each kept layer is compared with the one it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .adapter import refuse_cache
from .architecture import prune_config
from .pretrained import read_config
from .skeleton import build_skeleton, find_layer_list

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from .graph import BaseCheckpoint

_PLAIN = (bool, int, float, str, type(None))
_INDICES = {"layer_idx", "layer_id", "layer_number"}
_ONLY_WHEN_MADE = "init_"
"""Settings with this in their name are used when weights are made up."""


def check_same_layers(base: BaseCheckpoint, kept: Sequence[int]) -> None:
    """Raise `ModelError` unless the config that keeps these base layers makes the very layers that are kept."""
    depth = base.layers
    original = build_skeleton(read_config(base.folder), base.tensors)
    pruned = build_skeleton(read_config(base.folder, prune_config(base.folder, kept)), base.tensors)
    _check_cache(original, pruned)
    path, layers = find_layer_list(original, depth, base.layer_prefix)
    _, remade = find_layer_list(pruned, len(kept), base.layer_prefix, path)
    for position, layer in enumerate(kept):
        for difference in _differences(layers[layer], remade[position], position, depth, kept):
            raise ModelError(
                f"layer {layer} would be another layer at place {position} of the pruned model: {difference}, "
                "which no field of the config prevents"
            )
    shapes = {name: tuple(value.shape) for name, value in pruned.named_parameters()}
    for name, value in original.named_parameters():
        if not name.startswith(f"{path}.") and shapes.get(name) != tuple(value.shape):
            raise ModelError(
                f"{name!r} has shape {tuple(value.shape)} now, but {shapes.get(name)} in a model of {len(kept)} layers: "
                "it has a part for each layer, and no rule says which"
            )


def _check_cache(original: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Raise `ModelError` where the cache of keys and values counts tokens for the original's layers, and not for those left."""
    try:
        had_none = refuse_cache(original.config) is not None
    except Exception:  # has no cache of this kind
        return
    refusal = None if had_none else refuse_cache(pruned.config)
    if refusal is not None:
        raise ModelError(
            f"transformers has no cache for the layers that would be left ({refusal}); remove fewer, or list under 'layers' which"
        )


def _differences(layer: nn.Module, remade: nn.Module, position: int, depth: int, kept: Sequence[int]) -> Iterator[str]:
    modules, others = dict(layer.named_modules()), dict(remade.named_modules())
    for name in sorted(modules.keys() ^ others.keys()):
        yield f"{name!r} is in only one of them"
    for name, module in modules.items():
        other = others[name]
        where = repr(name) if name else "the layer"
        if type(module) is not type(other):
            yield f"{where} is a {type(module).__name__} in one and a {type(other).__name__} in the other"
        yield from _tensor_differences(where, module, other)
        for setting in sorted(vars(module).keys() | vars(other).keys()):
            original, made = vars(module).get(setting), vars(other).get(setting)
            if setting.startswith("_") or _ONLY_WHEN_MADE in setting or not (_is_plain(original) and _is_plain(made)):
                continue
            if not _is_same(original, made) and not _follows(setting, original, made, position, depth, kept):
                yield f"{setting!r} of {where} changes from {original!r} to {made!r}"


def _is_same(original: Any, made: Any) -> bool:
    if isinstance(original, float) and isinstance(made, float):
        return math.isclose(original, made, rel_tol=1e-12)
    return bool(original == made)


def _follows(setting: str, original: Any, made: Any, position: int, depth: int, kept: Sequence[int]) -> bool:
    """Whether a setting says where the layer is, how deep the model is, or which layers it has."""
    layer = kept[position]
    if isinstance(original, int) and isinstance(made, int):
        steps = (1, 2) if setting in _INDICES else (1,)  # some layers have two places in a cache
        return (original - made) in [(layer - position) * step for step in steps] or (original, made) == (depth, len(kept))
    if isinstance(original, list) and isinstance(made, list):
        number = {layer: place for place, layer in enumerate(kept)}
        is_by_layer = len(original) == depth and made == [original[layer] for layer in kept]
        return is_by_layer or made == [number[layer] for layer in original if layer in number]
    return False


def _tensor_differences(where: str, module: nn.Module, other: nn.Module) -> Iterator[str]:
    import torch

    for registry in ("_parameters", "_buffers"):
        original, made = getattr(module, registry), getattr(other, registry)
        for name in sorted(original.keys() | made.keys()):
            a, b = original.get(name), made.get(name)
            if (None if a is None else a.shape) != (None if b is None else b.shape):
                shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (a, b)]
                yield f"{name!r} of {where} has shape {shapes[0]} in one and {shapes[1]} in the other"
            elif registry == "_buffers" and a is not None and b is not None and not a.is_meta and not torch.equal(a, b):
                yield f"{name!r} of {where}, which is computed and not stored, has other values"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) or type(value).__module__ == "torch"
