"""What decoding with a cache takes: bytes of whole models in memory, and whether two go in together.

Sizes: B sequences, T tokens of a prompt, N tokens that are decoded after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import item_bytes
from ..data.generation import count_generation_bytes
from ..machine.memory import resident_bytes
from ..machine.memory_advice import lack_of_memory
from ..sweep.memory_plan import format_size
from .estimate import Estimate

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph
    from .model_costs import ModelCosts

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_inner")
_AT_ONCE = 3
"""Tensors of the width of a layer's MLP that one pass holds: both products and what goes on."""


@dataclass(frozen=True)
class DecodingShape:
    """One kind of work to time."""

    sequences: int
    """B"""
    prompt_tokens: int
    """T"""
    new_tokens: int
    """N"""


@dataclass(frozen=True)
class Residency:
    """How two models share the memory."""

    is_together: bool
    """Whether both are in memory all the time; else one at a time, read anew in every round."""
    peak_bytes: int
    """Of models, and of what a pass holds."""


def count_pass_bytes(graph: ModelGraph, shape: DecodingShape, dtype: str) -> tuple[int, int]:
    """Bytes of a whole model, and what decoding holds beside it: keys and values, hidden states of one layer, logits."""
    from ..checkpoint.source import load_config, text_config

    weights, each = count_generation_bytes(graph, shape.prompt_tokens + shape.new_tokens, dtype)
    config: dict[str, Any] = text_config(load_config(graph.base.folder))
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0
    width = next((config[name] for name in _WIDTHS if isinstance(config.get(name), int)), 4 * hidden)
    item = item_bytes(dtype)
    return weights, shape.sequences * (each + shape.prompt_tokens * item * (_AT_ONCE * width + 2 * _AT_ONCE * hidden))


def plan_residency(weights: Sequence[int], beside: int, free: int, dtype: str, held: int | None = None) -> Residency:
    """How models of so many bytes go into `free` bytes. `beside`: bytes that a pass of either holds besides. `held`: bytes of
    the process besides `free`, for messages; None: those that it has now.

    Raises `CapacityError` where not even one at a time fits.
    """
    if sum(weights) + beside <= free:
        return Residency(True, sum(weights) + beside)
    needed = max(weights) + beside
    if needed > free:
        raise lack_of_memory(
            f"a benchmark takes the whole model in memory, {format_size(max(weights))} in {dtype}, and {format_size(beside)} "
            f"for its sequences; {format_size(max(0, free))} are left",
            needed + (resident_bytes() if held is None else held),
            ["leave the step out"],
            dtype=dtype,
            by_option={"batch_sizes": "lower 'batch_sizes' or 'prompt_tokens'"},
        )
    return Residency(False, needed)


def check_room_for_decoding(graph: ModelGraph, shapes: Sequence[DecodingShape], free: int, dtype: str) -> None:
    """Raise `CapacityError` where a whole model does not go into `free` bytes with what the largest shape holds beside it."""
    counted = [count_pass_bytes(graph, shape, dtype) for shape in shapes]
    plan_residency([counted[0][0]], max(beside for _, beside in counted), free, dtype)


def estimate_decoding(costs: ModelCosts, depths: Sequence[int], shapes: Sequence[DecodingShape], rounds: int) -> Estimate:
    """So many rounds of each shape on models of so many layers each. Raises `CapacityError` where one does not fit."""
    whole = len(costs.graph.layers)
    dtype = costs.dtype
    counted = [count_pass_bytes(costs.graph, shape, dtype) for shape in shapes]
    weights = [round(counted[0][0] * costs.count_parameters(depth) / costs.count_parameters(whole)) for depth in depths]
    beside = max(held for _, held in counted)
    residency = plan_residency(weights, beside, costs.memory - costs.occupied, dtype, costs.occupied)
    reads = 1 if residency.is_together else rounds
    read = reads * sum(map(costs.count_bytes, depths))
    seconds, flops = read * costs.speed.read_again(), 0.0
    for shape in shapes:
        rows, tokens = shape.sequences, shape.prompt_tokens
        layer, head = costs.benchmark.layer_pass(rows, max(2, tokens)), costs.benchmark.head_pass(rows, 2)
        step = costs.benchmark.layer_pass(rows, 2)  # a head needs two tokens
        for depth in depths:
            once = depth * (layer.forward + shape.new_tokens * step.forward) + (1 + shape.new_tokens) * head.forward
            seconds += rounds * rows * once
            flops += rounds * rows * (depth * (layer.flops + shape.new_tokens * step.flops / 2) + head.flops)
    together = "both models in memory" if len(depths) > 1 else "the whole model in memory"
    lines = {
        "program": costs.occupied,
        "weights": sum(weights) if residency.is_together else max(weights),
        "keys, values and hidden states": beside,
    }
    return costs.opening() + Estimate(
        peak_bytes=sum(lines.values()),
        bytes_read=read,
        flops=flops,
        seconds=seconds,
        how=together if residency.is_together else "one model in memory at a time, read anew in each round",
        lines=lines,
    )
