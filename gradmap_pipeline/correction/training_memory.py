"""The memory that training a whole model takes: weights in fp32, Adam's moments, what autograd keeps of a batch, and its logits.

Sizes: B samples in memory at a time, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..machine.memory import give_back
from ..machine.memory_advice import lack_of_memory
from ..sweep.head_losses import LOGIT_BYTES
from ..sweep.memory_plan import format_size
from .distilling import count_losses_at_once

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph
    from ..sweep.layerwise import LayerwiseModel

_LIBRARIES = 256 << 20
"""Bytes that the trainer's libraries take: the compiler of torch, accelerate and peft."""
_GAPS = 16
"""One part in so many of what a step computes is lost between blocks that the allocator keeps."""


@dataclass(frozen=True)
class TrainingNeeds:
    """The memory that one sample takes in training."""

    tokens: int
    """T"""
    width: int
    """D"""
    layer_bytes: int
    """Bytes that autograd keeps of one sample in one layer whose weights are trained."""
    layer_casts: int
    """Bytes that it keeps of one layer for a batch of any size: weights in a narrower type, sines and cosines of positions."""
    position_bytes: int
    """Bytes of the logits of one position, of what autograd keeps of the head for them, and of their gradient."""
    head_casts: int
    """Bytes that autograd keeps of the head for a batch of any size."""
    losses_bytes: int
    """Bytes that the losses of a slice of the logits take."""


def measure_training_needs(graph: ModelGraph, tokens: int, dtype: str, device: str) -> TrainingNeeds:
    """Measure the memory that one sample takes in training, on the largest layer and the head with made-up weights in fp32.

    They compute in bfloat16 by torch's autocast where `dtype` is that, else in fp32.
    """
    import torch

    from ..sweep.layerwise import LayerwiseModel
    from ..sweep.weight_sources import ZeroWeights, make_up

    model = LayerwiseModel(graph.dense, device=device, dtype="float32", resident_bytes=0, weights=ZeroWeights())
    make_up(model.module)
    width = int(model.module.config.get_text_config().hidden_size)
    backend = torch.device(device).type
    with torch.random.fork_rng(), torch.autocast(backend, torch.bfloat16, enabled=dtype == "bfloat16"), torch.enable_grad():
        layer = [_keep_layer(model, samples, tokens) for samples in (1, 2)]
        head = [_keep_head(model, positions) for positions in (2, 4)]
    each, position = max(0, layer[1] - layer[0]), max(0, head[1] - head[0]) // 2
    losses = LOGIT_BYTES * count_losses_at_once(backend)
    needs = TrainingNeeds(tokens, width, each, max(0, layer[0] - each), position, max(0, head[0] - 2 * position), losses)
    del model
    give_back()
    return needs


def _keep_layer(model: LayerwiseModel, samples: int, tokens: int) -> int:
    """Bytes that autograd keeps of some samples in the largest layer, in training, besides its weights; not what comes out."""
    from ..sweep.needs import make_batch, noting_saved, sum_saved

    elements = model.graph.layer_elements()
    largest = max(elements, key=elements.__getitem__)
    hidden, arguments = model.record(make_batch(samples, tokens), is_made_up=True)
    with model.layer(largest) as module:
        weights = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
        for weight in weights:
            weight.requires_grad_(True)
        module.train()  # dropout keeps what it has dropped
        try:
            with noting_saved() as saved:
                output = model.run_layer(largest, hidden.detach().requires_grad_(), arguments[largest])
        finally:
            module.eval()
            for weight in weights:
                weight.requires_grad_(False)
        return sum_saved(saved, [*weights, output])


def _keep_head(model: LayerwiseModel, positions: int) -> int:
    """Bytes of the logits of some positions, of their gradient, and of what autograd keeps of the head besides its weights."""
    from ..sweep.needs import make_batch, noting_saved, sum_saved

    batch = make_batch(1, positions)
    hidden, _ = model.record(batch, is_made_up=True)
    with model.weights.head(), noting_saved() as saved:
        logits = model.head(batch, hidden.detach().requires_grad_())
        return sum_saved(saved, [*model.module.parameters(), logits]) + 2 * logits.nbytes


def count_trained(weights: Literal["lora", "all"], parameters: int, layers: int, rank: int, width: int) -> int:
    """About how many parameters are trained: of LoRA, rank · (inputs + outputs) of seven maps a layer, one side of each `width`
    and the other up to four times that."""
    return parameters if weights == "all" else layers * rank * 20 * width


def training_bytes(
    needs: TrainingNeeds,
    layers: int,
    parameters: int,
    trained: int,
    batch: int,
    processes: int = 1,
    *,
    is_summed: bool = False,
) -> dict[str, int]:
    """Bytes that training a model of so many layers and parameters takes in a process, by what they are for.

    `trained`: parameters that change. `batch`: B. `processes`: that train together; each holds the gradients once more while they
    are summed. `is_summed`: a step takes several batches, whose gradients are summed. The most is held either when the loss is
    computed, beside gradients of earlier batches, or when all gradients are there and nothing of the batch.
    """
    activations = layers * (batch * needs.layer_bytes + needs.layer_casts)
    logits = batch * needs.tokens * needs.position_bytes + needs.head_casts + needs.losses_bytes
    return {
        "libraries": _LIBRARIES,
        "weights": 4 * parameters,
        "moments": (8 if processes == 1 else 12) * trained,
        "activations": activations,
        "logits": logits,
        "gradients": max(4 * trained if is_summed else 0, 8 * trained - activations - logits),
        "allocator": (activations + logits) // _GAPS,
    }


def check_memory_for_training(needed: int, allowed: int, weights: Literal["lora", "all"]) -> None:
    """Raise `CapacityError` where training the whole model takes more than what is allowed."""
    if needed > allowed:
        ways = ["lower 'samples_at_once' or 'sequence_length'", "take refit_layers, which holds one layer"]
        raise lack_of_memory(
            f"training the whole model takes {format_size(needed)}, its weights, gradients, moments and activations, over the "
            f"{format_size(allowed)} allowed",
            needed,
            ["use weights: lora", *ways] if weights == "all" else ways,
        )
