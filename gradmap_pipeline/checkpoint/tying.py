"""A config that ties the head to the embeddings, beside a checkpoint that holds two that differ.

transformers goes by the checkpoint then, and other programs go by the config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adapter import find_embeddings, find_head, is_tied, prefix_on_disk
from .checkpoint import read_chunks
from .pretrained import read_config
from .skeleton import build_skeleton

if TYPE_CHECKING:
    from .graph import ModelGraph

TIE_KEY = "tie_word_embeddings"


def has_own_head(graph: ModelGraph) -> bool:
    """Tell whether the config ties the head to the embeddings although the checkpoint holds a head with other values.

    Reads both where the checkpoint has both. Source: `tie_weights` of transformers 5.
    """
    import torch

    config = read_config(graph.base.folder)
    if not getattr(config, TIE_KEY, False):
        return False
    tensors = graph.other_tensors()
    if sum(len(tensor.shape) == 2 for tensor in tensors.values()) < 2:
        return False
    module = build_skeleton(config, graph.base.tensors)
    names = {id(part): name for name, part in module.named_modules()}
    start = prefix_on_disk(module)
    stored = []
    for part in (find_embeddings(module), find_head(module)):
        if part is None:
            return False
        name = f"{names[id(part)]}.weight"
        stored += [tensors[key] for key in dict.fromkeys((name, name.removeprefix(start))) if key in tensors]
    if len(stored) != 2 or not is_tied(module, name):
        return False
    one, other = stored
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return True
    return not all(torch.equal(mine, theirs) for mine, theirs in zip(read_chunks(one), read_chunks(other), strict=True))


def untie(config: dict[str, Any]) -> None:
    """Have a config.json say that the head has weights of its own."""
    config[TIE_KEY] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"][TIE_KEY] = False
