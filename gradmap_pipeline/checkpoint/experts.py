"""Where the experts of a mixture of experts lie in a checkpoint, and what is left of it when some go.

E: experts of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .architecture import full_config
from .checkpoint import StoredTensor, load_tensor, read_header
from .source import load_config

if TYPE_CHECKING:
    from .graph import ModelGraph

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of a config that count the experts a router chooses among."""
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_GROUPS = ("n_group", "num_expert_group", "moe_n_group")
_ONE = re.compile(r"(.*\bexperts\.)([0-9]+)(\..*)")
_ROUTERS = {"gate", "router", "experts", "e_score_correction_bias", "expert_bias", "moe_statics", "input_linear", "output_linear"}
"""Parts of names of tensors that hold something for each expert."""

SUPPORTED = frozenset(
    (
        "aria_text",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "dots3_note_text",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "jamba",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "lfm2_moe",
        "mellum",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl_text",
        "mixtral",
        "nemotron_h",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
        "solar_open",
    )
)
"""Model types whose experts are known to be cut out rightly: what is left equals the model with those experts masked out."""


@dataclass
class LayerExperts:
    """The experts of one layer."""

    single: dict[str, int] = field(default_factory=dict)
    """Name of a tensor of one expert, and which one it is."""
    stacked: dict[str, int] = field(default_factory=dict)
    """Name of a tensor of all experts, or of the router, and the dimension of size E."""


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of a model, by kept layer; layers without are left out."""

    count: int
    """E"""
    chosen: int
    """Experts that a token is sent to."""
    fields: tuple[str, ...]
    """Names of the fields of the config that say E."""
    layers: Mapping[int, LayerExperts]


def find_experts(graph: ModelGraph) -> ExpertLayout:
    """Raises `ModelError` where there are none, or not the same number in all layers that have some."""
    config = full_config(graph.base.folder)
    fields = tuple(name for name in _COUNTS if isinstance(config.get(name), int) and config[name] > 1)
    kind = str(load_config(graph.base.folder).get("model_type", "this model"))
    if not fields:
        raise ModelError(f"{kind} has no experts: its config has none of {', '.join(_COUNTS)} over 1")
    if kind not in SUPPORTED:
        raise ModelError(f"experts of {kind} cannot be cut out; those of these model types can: {', '.join(sorted(SUPPORTED))}")
    counts = {config[name] for name in fields}
    if len(counts) > 1:
        raise ModelError(f"the config says several numbers of experts: {', '.join(f'{name} {config[name]}' for name in fields)}")
    groups = next((name for name in _GROUPS if isinstance(config.get(name), int) and config[name] > 1), None)
    if groups is not None:
        raise ModelError(f"the router of {kind} chooses experts by groups ({groups} is {config[groups]}), which have to stay whole")
    (count,) = counts
    by_layer = {layer: _find_in_layer(graph.layer_tensors(layer), count) for layer in graph.layers}
    layers = {layer: experts for layer, experts in by_layer.items() if experts is not None}
    if not layers:
        raise ModelError(f"no tensor of {kind} is of one of its {count} experts, by the names of any known layout")
    for layer, experts in layers.items():
        held = set(experts.single.values())
        if held and held != set(range(count)):
            raise ModelError(f"layer {layer} has {len(held)} experts in the checkpoint, and its config says {count}")
        if not any(
            part in _ROUTERS - {"experts", "input_linear", "output_linear"} for name in experts.stacked for part in name.split(".")
        ):
            raise ModelError(f"layer {layer} has experts, but no router by the names of any known layout")
    chosen = next((int(config[name]) for name in _CHOSEN if isinstance(config.get(name), int)), 1)
    return ExpertLayout(count, chosen, fields, layers)


def _find_in_layer(tensors: Mapping[str, StoredTensor], count: int) -> LayerExperts | None:
    layer = LayerExperts()
    for name, tensor in tensors.items():
        one = _ONE.fullmatch(name)
        parts = set(name.split("."))
        if one is not None:
            layer.single[name] = int(one[2])
        elif parts & _ROUTERS and count in tensor.shape and not any("shared" in part for part in parts):
            layer.stacked[name] = tensor.shape.index(count)
    has_experts = layer.single or any({"experts", "input_linear"} & set(name.split(".")) for name in layer.stacked)
    return layer if has_experts else None


def select_experts(
    graph: ModelGraph, layout: ExpertLayout, kept: Mapping[int, Sequence[int]], folder: Path
) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of the model with some experts only, under the names they have after export; a layer at a time, then the rest.

    `kept`: experts by base layer, ascending; their order is that of the new numbers. `folder`: gets a file for each layer with
    what is cut out of larger tensors.
    """
    from safetensors.torch import save_file

    names = graph.export_names()
    for layer, experts in layout.layers.items():
        made: dict[str, StoredTensor] = {}
        numbers = {old: new for new, old in enumerate(kept[layer])}
        cut: dict[str, Any] = {}
        for name, tensor in graph.layer_tensors(layer).items():
            if name in experts.single:
                old = experts.single[name]
                if old in numbers:
                    made[_ONE.sub(rf"\g<1>{numbers[old]}\g<3>", names[name])] = tensor
            elif name in experts.stacked:
                cut[names[name]] = load_tensor(tensor).index_select(experts.stacked[name], _index(kept[layer])).contiguous()
            else:
                made[names[name]] = tensor
        file = folder / f"layer-{layer}.safetensors"
        save_file(cut, file)
        del cut
        yield {**made, **read_header(file)}
    without = {layer: graph.layer_tensors(layer) for layer in graph.layers if layer not in layout.layers}
    rest = {**graph.other_tensors(), **{name: tensor for tensors in without.values() for name, tensor in tensors.items()}}
    yield {names[name]: tensor for name, tensor in rest.items()}


def _index(numbers: Sequence[int]) -> Any:
    import torch

    return torch.tensor(list(numbers))


def count_in_config(config: dict[str, Any], layout: ExpertLayout, count: int) -> None:
    """Have a config.json say another number of experts, wherever it says it."""
    inner = config.get("text_config")
    part = inner if isinstance(inner, dict) else config
    said = [name for name in _COUNTS if part.get(name) == layout.count]  # a class may read a field by another name than it writes
    part.update(dict.fromkeys(said or layout.fields, count))
