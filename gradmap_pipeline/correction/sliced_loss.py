"""The mean loss of next tokens, made with its gradient from a few positions at a time: one copy of the logits is held beside them.

Sizes: B sequences a batch, T tokens, V vocabulary, N positions of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .distilling import count_losses_at_once

PositionLosses = Callable[[torch.Tensor, int, slice], torch.Tensor]
"""From logits fp32 (N, V), a sequence and its positions to their losses, fp32 (N)."""


def mean_by_slices(logits: torch.Tensor, losses: PositionLosses) -> torch.Tensor:
    """Mean over all positions but the last of each sequence of the losses of logits (B, T, V), fp32.

    The gradient takes as much as the logits, in their type, and is made with the mean. To differentiate a second time raises
    `RuntimeError`.
    """
    mean: torch.Tensor = _SlicedMean.apply(logits, losses)  # type: ignore[no-untyped-call]
    return mean


class _SlicedMean(torch.autograd.Function):
    """The mean, whose gradient is made before it is asked for."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, losses: PositionLosses) -> torch.Tensor:
        sequences, tokens, words = logits.shape
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        step = max(1, count_losses_at_once(logits.device.type) // words)
        for sequence in range(sequences):
            for start in range(0, tokens - 1, step):
                positions = slice(start, min(start + step, tokens - 1))
                part = logits[sequence, positions].detach().float()
                with torch.set_grad_enabled(wanted):
                    loss = losses(part.requires_grad_(wanted), sequence, positions).sum() / (sequences * (tokens - 1))
                total += loss.detach()
                if gradient is not None:
                    gradient[sequence, positions] = torch.autograd.grad(loss, part)[0]
            if gradient is not None:
                gradient[sequence, tokens - 1] = 0
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(factor), None
