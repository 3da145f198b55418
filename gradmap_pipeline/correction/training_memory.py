"""What training a whole model in memory takes: weights in fp32, Adam's moments, what autograd keeps of a batch, and its logits.

Sizes: B samples in memory at a time, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..machine.memory import give_back
from ..machine.memory_advice import lack_of_memory
from ..sweep.head_losses import LOGIT_BYTES
from ..sweep.memory_plan import format_size

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph

LOSSES_AT_ONCE = 1 << 21
"""Logits whose losses are computed at a time: blocks of 8 MiB in fp32. The C library reuses them, and maps larger ones anew."""
_LIBRARIES = 256 << 20
"""Bytes that the trainer's libraries take: the compiler of torch, accelerate and peft."""
_GAPS = 16
"""One part in so many of what a step computes is lost between blocks that the allocator keeps."""


@dataclass(frozen=True)
class TrainingNeeds:
    """What one sample takes where a model is trained, in bytes where nothing else is said."""

    tokens: int
    """T"""
    words: int
    """V"""
    width: int
    """D"""
    saved_bytes: int
    """What autograd keeps of one sample in one layer whose weights are trained."""
    cast_bytes: int
    """What it keeps of one layer whatever the batch: weights in a narrower type, sines and cosines of positions."""
    item_bytes: int
    """Of a number in the type that is computed in."""


def measure_training_needs(graph: ModelGraph, tokens: int, dtype: str, device: str) -> TrainingNeeds:
    """Run one and two samples through one layer of a model, weights in fp32; in bfloat16 where `dtype` says so."""
    from ..sweep.layerwise import LayerwiseModel
    from ..sweep.needs import measure_saved_in_training

    model = LayerwiseModel(graph.dense, device=device, dtype="float32", resident_bytes=0)
    saved, casts = measure_saved_in_training(model, tokens, is_narrow=dtype == "bfloat16")
    width = int(model.module.config.get_text_config().hidden_size)
    needs = TrainingNeeds(tokens, model.words, width, saved, casts, 2 if dtype == "bfloat16" else 4)
    del model
    give_back()
    return needs


def count_trained(weights: Literal["lora", "all"], parameters: int, layers: int, rank: int, width: int) -> int:
    """About how many parameters are trained: of LoRA, rank · (inputs + outputs) of seven maps a layer, one side of each `width`
    and the other up to four times that."""
    return parameters if weights == "all" else layers * rank * 20 * width


def training_bytes(
    needs: TrainingNeeds, layers: int, parameters: int, trained: int, batch: int, processes: int = 1
) -> dict[str, int]:
    """Bytes that training a model of so many layers and parameters takes in a process, by what they are for.

    `trained`: parameters that change. `batch`: B. `processes`: that train together; each holds the gradients once more while they
    are summed. The most is held either when the loss is computed, or when all gradients are there and nothing of the batch.
    """
    activations = layers * (batch * needs.saved_bytes + needs.cast_bytes)
    logits = 2 * needs.item_bytes * batch * needs.tokens * needs.words + LOGIT_BYTES * LOSSES_AT_ONCE  # and their gradient
    head = 2 * needs.words * needs.width if needs.item_bytes == 2 else 0  # its weights in the narrow type
    moments = (8 if processes == 1 else 12) * trained
    return {
        "libraries": _LIBRARIES,
        "weights": 4 * parameters,
        "moments": moments,
        "activations": activations,
        "logits": logits + head,
        "gradients": max(0, 8 * trained - activations - logits - head),
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
