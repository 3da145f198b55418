"""The losses by which a small model learns from a whole one: the likeliest next tokens of the whole model, or the text itself.

Sizes: B sequences a batch, T tokens, K choices of the teacher, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..machine.memory_advice import lack_of_memory
from ..sweep.head_losses import LOGIT_BYTES
from ..sweep.memory_plan import format_size

if TYPE_CHECKING:
    import torch

    from ..sweep.needs import SweepNeeds

_LEAST = 1e-30
_LIBRARIES = 256 << 20
"""Bytes that the trainer's libraries take: the compiler of torch, accelerate and peft."""


def divergence_from(logits: torch.Tensor, choices: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """KL in nats from the teacher's to the student's prediction at each position, (B, T-1), fp32.

    Of student logits (B, T-1, V), the teacher's likeliest tokens `choices` int64 (B, T-1, K), and the logarithms `logs` of their
    probabilities. All other tokens count as one: the sum over K + 1 outcomes, which is at most the KL over V (the log sum
    inequality), and equal to it where K is V.
    """
    import torch

    mine = logits.float().log_softmax(-1).gather(-1, choices)
    share = logs.exp()
    inside = (share * (logs - mine)).sum(-1)
    if choices.shape[-1] == logits.shape[-1]:
        return inside
    rest, my_rest = (1 - part.exp().sum(-1) for part in (logs, mine))
    rest, my_rest = rest.clamp_min(0), my_rest.clamp_min(_LEAST)
    outside = torch.where(rest > _LEAST, rest * (rest.clamp_min(_LEAST).log() - my_rest.log()), 0.0)
    return inside + outside


def loss_on(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next token, (B, T-1), fp32, from logits (B, T-1, V) and token ids (B, T)."""
    import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by

    return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


def count_trained(weights: Literal["lora", "all"], parameters: int, layers: int, rank: int, width: int) -> int:
    """About how many parameters are trained: of LoRA, rank · (inputs + outputs) of seven maps a layer, one side of each `width`
    and the other up to four times that."""
    return parameters if weights == "all" else layers * rank * 20 * width


def training_bytes(needs: SweepNeeds, parameters: int, trained: int, batch: int, processes: int = 1) -> dict[str, int]:
    """Bytes that training a whole model in fp32 with Adam takes in a process, by what they are for.

    `needs`: of a sweep with gradients over the model. `trained`: parameters that change. `batch`: samples in memory at a time.
    `processes`: that train together; each holds the gradients once more while they are summed.
    """
    logits = LOGIT_BYTES * batch * needs.tokens * needs.words
    return {
        "libraries": _LIBRARIES,
        "weights": 4 * parameters,
        "gradients and moments": (16 if processes == 1 else 20) * trained,
        "activations": batch * (needs.layers * (needs.saved_bytes + needs.boundary_bytes) + needs.saved_bytes),
        "logits": logits,
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
