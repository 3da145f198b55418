"""Which config fields speak of single layers, and what they become when layers are removed. The one place that knows.

A field of a model's depth that no rule here knows is an error. What rules miss is found by comparing the layers of the two
configs (`layer_check`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..errors import ModelError
from .cadence import cadences_of

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks")
"""The number of layers goes by one of these."""

LAYER_LISTS = ("layers_block_type",)
"""Or it is the length of one of these."""

SLICED = {
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "attention_layers",
    "attn_layers",
    "indexer_types",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "intermediate_size",
    "activation_sparsity_pattern",
    "num_experts",
    "moe_topk",
    "num_shared_expert",
    "moe_intermediate_size",
    "moe_layer_freq",
    "swiglu_limits",
    "swiglu_limits_shared",
}
"""Lists with one entry per layer: a pruned model keeps the entries of its layers."""

CYCLED = {"block_types"}
"""Lists that start again from the top until every layer has an entry: a pruned model has them written out."""

INDICES = {
    "mlp_only_layers": 0,
    "moe_layers": 0,
    "full_attn_idxs": 0,
    "attn_layer_indices": 0,
    "hybrid_layer_ids": 0,
    "cross_attention_layers": 0,
    "local_layer_ids": 0,
    "kda_layers": 0,
    "ple_layer_ids": 1,
}
"""Lists of layer indices, with the index of the first layer: a pruned model renumbers those it keeps."""

MAPS = {"per_layer_config"}
"""Maps from layer index: a pruned model renumbers those it keeps."""

FROM_BOTTOM = {"max_window_layers", "first_k_dense_replace", "num_dense_layers", "dense_mlp_idx"}
"""Numbers of layers from the bottom to which something applies: a pruned model counts its layers among them."""

BY_ROOT = {"scale_depth"}
"""Scales that are divided by the square root of the number of layers: a pruned model keeps the quotient."""

FROM_TOP = {"num_kv_shared_layers"}
"""The same from the top."""

BEYOND_TOP = {"num_nextn_predict_layers"}
"""Numbers of further layers, stored after the last and used by no causal LM: a pruned model has none."""

TIED_TO_INDEX = {"scale_attn_by_inverse_layer_idx"}
"""Switches that put a layer's index into its arithmetic: no config expresses a renumbered layer."""

NOT_BY_LAYER = {
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "time_step_limit",
    "mlp_multipliers",
    "ssm_multipliers",
    "axial_pos_shape",
    "axial_pos_embds_dim",
    "L_bp_cycles",
    "languages",
    "mtp_layer_types",
    "mtp_mlp_layer_types",
    "mtp_layers_block_type",
    "mtp_local_layer_ids",
    "rope_parameters",
    "rope_scaling",
    "compress_rates",
    "bad_words_ids",
}
"""Lists and maps that have the model's depth by chance alone."""


def layer_count_key(config: dict[str, Any]) -> str | None:
    """The name under which this architecture keeps its number of layers."""
    return next((key for key in LAYER_COUNTS if isinstance(config.get(key), int)), None)


def count_layers(config: dict[str, Any]) -> int | None:
    """Number of decoder layers, or None where only the architecture's class knows it."""
    key = layer_count_key(config)
    if key is not None:
        return int(config[key])
    return next((len(config[name]) for name in LAYER_LISTS if isinstance(config.get(name), list)), None)


def prune_fields(written: dict[str, Any], meant: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a decoder's config that keeps these layers.

    `meant`: the config with all that its class derives. Lists that are derived are written out, so that the pruned model does
    not derive them anew from its new depth. Raises `ModelError` where no config expresses the layers kept.
    """
    depth = count_layers(written)
    if depth is None:
        raise ModelError("its config.json does not say how many layers the model has")
    if len(kept) == depth:
        return dict(written)
    whole = {**written, **meant}
    check_removable(whole)
    pruned = {**written, **{key: len(kept) for key in LAYER_COUNTS if written.get(key) == depth}}
    for field, value in whole.items():
        rule = _find_rule(field, value, depth)
        if rule is not None:
            pruned[field] = rule(value, kept, depth)
        elif field not in NOT_BY_LAYER and _has_depth(value, depth):
            raise ModelError(
                f"config field {field!r} has as many entries as the model has layers ({depth}), and no rule says whether it goes "
                "by layer"
            )
    _check_shared_states(whole, kept, depth)
    for cadence in cadences_of(whole):
        before = cadence.read(whole, depth)
        after = tuple(before[layer] for layer in kept)
        fields = cadence.write(whole, after)
        if fields is None:
            values = ", ".join(f"{field} = {whole[field]}" for field in cadence.fields)
            raise ModelError(
                f"layers are placed by a cadence ({values}), which no values express for the layers that would be left"
            )
        pruned |= fields
    if "attention_types" in whole and isinstance(pruned.get("attention_layers"), list):
        pruned["attention_types"] = [[[name], 1] for name in pruned["attention_layers"]]
    return pruned


def check_removable(config: dict[str, Any]) -> None:
    """Raise `ModelError` where no layer can be removed at all."""
    for field in TIED_TO_INDEX:
        if config.get(field):
            raise ModelError(f"config field {field!r} ties each layer to its index, so no layer can be removed")


def find_sources(config: dict[str, Any]) -> dict[int, list[int]]:
    """Layers whose keys and values others use instead of their own: by source, those that use it."""
    depth, shared, kinds = count_layers(config), config.get("num_kv_shared_layers"), config.get("layer_types")
    if not (depth and isinstance(shared, int) and shared and isinstance(kinds, list) and len(kinds) == depth):
        return {}
    sources: dict[int, list[int]] = {}
    for layer in range(depth - shared, depth):
        own = [below for below in range(depth - shared) if kinds[below] == kinds[layer]]
        if own:
            sources.setdefault(own[-1], []).append(layer)
    return sources


def _check_shared_states(config: dict[str, Any], kept: Collection[int], depth: int) -> None:
    for source, users in find_sources(config).items():
        left = [layer for layer in users if layer in kept]
        if left and source not in kept:
            raise ModelError(
                f"layer {source} supplies keys and values to layers {', '.join(map(str, left))} of {depth}, "
                "so it must stay while they do"
            )


def _find_rule(field: str, value: Any, depth: int) -> Callable[[Any, Sequence[int], int], Any] | None:
    if isinstance(value, list):
        if field in SLICED and len(value) == depth:
            return lambda items, kept, _: [items[layer] for layer in kept]
        if field in CYCLED and value:
            return lambda items, kept, _: [items[layer % len(items)] for layer in kept]
        if field in INDICES:
            first = INDICES[field]
            return lambda items, kept, _: [p + first for p, layer in enumerate(kept) if layer + first in items]
    if isinstance(value, dict) and field in MAPS:
        return _renumber
    if isinstance(value, int | float) and not isinstance(value, bool):
        if field in BY_ROOT:
            return lambda scale, kept, depth: scale * math.sqrt(len(kept) / depth)
        if field in FROM_BOTTOM:
            return lambda count, kept, _: sum(layer < count for layer in kept)
        if field in FROM_TOP:
            return lambda count, kept, depth: sum(layer >= depth - count for layer in kept)
        if field in BEYOND_TOP:
            return lambda *_: 0
    return None


def _renumber(items: dict[Any, Any], kept: Sequence[int], _: int) -> dict[str, Any]:
    """Keys are layer indices, as numbers or as text, perhaps with zeros in front."""
    is_padded = any(len(str(key)) > 1 and str(key).startswith("0") for key in items)
    width = max(len(str(key)) for key in items) if is_padded else 1
    by_layer = {int(key): value for key, value in items.items()}
    return {str(position).zfill(width): by_layer[layer] for position, layer in enumerate(kept) if layer in by_layer}


def _has_depth(value: Any, depth: int) -> bool:
    if isinstance(value, list):
        return len(value) == depth
    return isinstance(value, dict) and len(value) == depth and all(str(key).isdigit() for key in value)
