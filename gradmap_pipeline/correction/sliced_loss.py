"""The mean loss of next tokens, made with its gradient from a few positions at a time: one copy of the logits is held beside them.

Sizes: B sequences a batch, T tokens, V vocabulary, N positions of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from .distilling import count_losses_at_once

if TYPE_CHECKING:
    import torch

PositionLosses: TypeAlias = "Callable[[torch.Tensor, int, slice], torch.Tensor]"
"""From logits fp32 (N, V), a sequence and its positions to their losses, fp32 (N)."""


def mean_by_slices(logits: torch.Tensor, losses: PositionLosses) -> torch.Tensor:
    """Mean over all positions but the last of each sequence of the losses of logits (B, T, V), fp32.

    The gradient takes as much as the logits, in their type, and is made with the mean. To differentiate a second time raises
    `RuntimeError`.
    """
    mean: torch.Tensor = _make_function().apply(logits, losses)
    return mean


def _sum_up(logits: torch.Tensor, losses: PositionLosses, gradient: torch.Tensor | None) -> torch.Tensor:
    """The mean. Its gradient is written into `gradient`, if it is wanted."""
    import torch

    sequences, tokens, words = logits.shape
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    step = max(1, count_losses_at_once(logits.device.type) // words)
    for sequence in range(sequences):
        for start in range(0, tokens - 1, step):
            positions = slice(start, min(start + step, tokens - 1))
            part = logits[sequence, positions].detach().float().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                loss = losses(part, sequence, positions).sum() / (sequences * (tokens - 1))
            total += loss.detach()
            if gradient is not None:
                gradient[sequence, positions] = torch.autograd.grad(loss, part)[0]
    if gradient is not None:
        gradient[:, -1] = 0
    return total


@cache
def _make_function() -> Any:
    """The mean as torch's autograd takes it. Torch is imported when it is first needed."""
    import torch

    class SlicedMean(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, losses: PositionLosses) -> torch.Tensor:
            gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
            mean = _sum_up(logits, losses, gradient)
            if gradient is not None:
                ctx.save_for_backward(gradient)
            return mean

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor, None]:
            (gradient,) = ctx.saved_tensors
            return gradient.mul_(factor), None

    return SlicedMean
