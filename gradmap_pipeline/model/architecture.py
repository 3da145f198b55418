"""What differs between architectures: where layers lie in a checkpoint, and which config fields speak of single layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .source import find_obstacle, layer_count_key, load_config

SLICED = {"layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers", "indexer_types"}
"""Lists with one entry per layer: a pruned model keeps the entries of its layers."""

COUNTED = {"max_window_layers", "first_k_dense_replace", "num_dense_layers"}
"""Numbers of layers from the bottom to which something applies: a pruned model counts its layers below."""

INDEXED = {"mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices"}
"""Lists of layer indices: a pruned model renumbers those it keeps."""

NOT_PER_LAYER = {"architectures", "eos_token_id", "bos_token_id", "pad_token_id", "id2label", "label2id", "suppress_tokens"}
"""Lists that have the model's depth by chance alone."""


def find_layer_prefix(names: Collection[str], layers: int) -> str:
    """The common start of layer tensors: the dotted path whose next parts are 0 … layers-1. There must be one."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?)\.(\d+)\.", name)
        if match:
            numbers.setdefault(match[1], set()).add(int(match[2]))
    candidates = [prefix for prefix, found in numbers.items() if set(range(layers)) <= found]
    if len(candidates) != 1:
        found = ", ".join(f"{prefix}.* ({len(found)})" for prefix, found in sorted(numbers.items())) or "none"
        raise ModelError(f"the checkpoint has no single list of {layers} layers, as its config says; numbered tensors: {found}")
    return candidates[0]


def layer_of(name: str, prefix: str) -> int | None:
    """The base layer a tensor belongs to."""
    if not name.startswith(prefix + "."):
        return None
    number = name[len(prefix) + 1 :].split(".", 1)[0]
    return int(number) if number.isdigit() else None


def prune_config(folder: Path, kept: Sequence[int]) -> dict[str, Any]:
    """config.json of the model that keeps these base layers.

    Lists that the architecture derives from other fields are written out, so that the pruned model
    does not derive them anew from its new depth.
    """
    from transformers import AutoConfig

    written = load_config(folder)
    key = layer_count_key(written)
    obstacle = find_obstacle(written) if key is None or len(kept) != written[key] else None
    if obstacle is not None:
        raise ModelError(f"no layer of this model can be removed: {obstacle}")
    if key is None:
        raise ModelError(f"{str(folder / 'config.json')!r} does not say how many layers the model has")
    depth = int(written[key])
    meant = AutoConfig.from_pretrained(folder).to_dict()
    kept = list(kept)
    if len(kept) == depth:
        return written
    obstacle = find_obstacle(meant)
    if obstacle is not None:
        raise ModelError(f"no layer of this model can be removed: {obstacle}")
    number = {layer: position for position, layer in enumerate(kept)}
    pruned = {**written, key: len(kept)}
    for field, value in {**written, **meant}.items():
        if field in SLICED and isinstance(value, list) and len(value) == depth:
            pruned[field] = [value[layer] for layer in kept]
        elif field in COUNTED and isinstance(value, int):
            pruned[field] = sum(layer < value for layer in kept)
        elif field in INDEXED and isinstance(value, list):
            pruned[field] = [number[layer] for layer in value if layer in number]
        elif isinstance(value, list) and len(value) == depth and field not in NOT_PER_LAYER:
            raise ModelError(
                f"config field {field!r} is a list as long as the model is deep ({depth}), "
                "and no rule says whether it goes by layer"
            )
    return pruned
