"""The losses by which a small model learns from a whole one: the likeliest next tokens of the whole model, or the text itself.

Sizes: B sequences a batch, T tokens, K choices of the teacher, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LEAST = 1e-30
_AT_ONCE, _AT_ONCE_ELSEWHERE = 1 << 21, 1 << 25
"""Logits. On the CPU the C library reuses blocks of 8 MiB in fp32, and maps larger ones anew; elsewhere each call has a price."""


def count_losses_at_once(device: str) -> int:
    """Logits whose losses are computed at a time on a type of device, as torch names it."""
    return _AT_ONCE if device == "cpu" else _AT_ONCE_ELSEWHERE


def divergence_from(logits: torch.Tensor, choices: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """KL in nats from the teacher's to the student's prediction at each position, (…), fp32.

    Of student logits (…, V), the teacher's likeliest tokens `choices` int64 (…, K), and the logarithms `logs` of their
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


def loss_on(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of the tokens that follow, int64 (…), fp32 (…), from logits (…, V)."""
    import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by

    losses = F.cross_entropy(logits.float().flatten(0, -2), following.flatten(), reduction="none")
    return losses.view(following.shape)
