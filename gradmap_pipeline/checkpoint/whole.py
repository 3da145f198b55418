"""A graph as one model in memory, for programs that take a whole one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..errors import ModelError
from . import adapter
from .architecture import layer_of, prune_config
from .casts import FOR_COMPUTING
from .checkpoint import load_rounded
from .loading import load_checked, trace_disk_name
from .pretrained import read_config
from .skeleton import build_skeleton, find_layer_list

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..batches import Batch
    from .checkpoint import StoredTensor
    from .graph import ModelGraph


def load_whole(graph: ModelGraph, dtype: str, device: str = "cpu", remedy: str = FOR_COMPUTING) -> PreTrainedModel:
    """The causal LM, weights as they are exported, in `dtype`. Takes the bytes of its weights and no more: tensors go in a layer
    at a time.

    Raises `StageError` where a finite weight would become infinite; `remedy`: what to do then.
    """
    import torch

    wanted: torch.dtype = getattr(torch, dtype)
    config = read_config(graph.base.folder, prune_config(graph.base.folder, graph.layers))
    module = build_skeleton(config, graph.base.tensors, wanted, device)
    by_layer: dict[int | None, dict[str, StoredTensor]] = {}
    for name, stored in graph.export_tensors().items():
        by_layer.setdefault(layer_of(name, graph.base.layer_prefix), {})[name] = stored
    missing: set[str] = set()
    for layer in sorted(by_layer, key=lambda layer: -1 if layer is None else layer):
        tensors = by_layer[layer]
        reads = {name: partial(load_rounded, tensors[name], graph.dtype, wanted, remedy=remedy) for name in tensors}
        loading = load_checked(module, reads, wanted, device)
        missing = loading.missing if layer is None else missing
    adapter.tie_weights(module, missing)
    lacking = next((name for name, parameter in module.named_parameters() if parameter.is_meta), None)
    if lacking is not None:
        raise ModelError(f"{str(graph.base.folder)!r} lacks the weights of {lacking!r}")
    module.requires_grad_(False)
    return module


def name_on_disk(module: PreTrainedModel, graph: ModelGraph) -> dict[str, str]:
    """Name in the base checkpoint of each floating-point parameter that is one tensor there, by its name in `module`.

    `module`: what `load_whole` made of the graph. Parameters that are tied have one name.
    """
    path, _ = find_layer_list(module, len(graph.layers), graph.base.layer_prefix)
    names: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        disk = name
        if name.startswith(f"{path}."):
            position, _, inside = name[len(path) + 1 :].partition(".")
            layer = graph.layers[int(position)]
            disk = f"{graph.base.layer_prefix}.{layer}.{inside}"
            if disk not in graph.base.tensors:
                try:
                    disk = trace_disk_name(graph, layer, inside)
                except ModelError:
                    continue
        if disk in graph.base.tensors and graph.stored_tensor(disk).shape == tuple(parameter.shape):
            names[name] = disk
    return names


def compute_logits(model: PreTrainedModel, device: str) -> Callable[[Batch], torch.Tensor]:
    """A function from a batch of token ids (B, T) to the logits (B, T, V) of a causal LM that is in memory."""
    import torch

    from .rope import forget_lengths

    model = model.eval()
    forget_lengths(model)

    def run(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            mask = batch.mask.long().to(device)
            logits: torch.Tensor = model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits
            return logits

    return run
