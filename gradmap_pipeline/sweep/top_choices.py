"""The likeliest next tokens that a model predicts, and how likely it takes them for.

Sizes: B sequences a batch, T tokens, K choices, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .head_losses import compute_logits, slice_positions

if TYPE_CHECKING:
    import torch

    from .sweep import Sweep


def find_top_choices(sweep: Sweep, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each of the sweep's batches, at every position that another follows: ids int32 (B, T-1, K) of the `count` likeliest next
    tokens, most likely first, and the logarithms of their probabilities, fp32 (B, T-1, K).

    K is `count`, or V where that is less. Logits are held for as many positions at once as the sweep's plan says.
    """
    import torch

    for one in sweep.passes():
        one.run_forward()
        with one.model.weights.head(), torch.no_grad():
            for number, batch in enumerate(one.batches):
                hidden, parts = one.boundary(len(one.layers), number), []
                for positions in slice_positions(one.model, batch):
                    if positions == slice(0, hidden.shape[1]):
                        logits = compute_logits(one.model, batch, hidden)
                    else:
                        logits = one.model.head(batch, hidden, positions)
                    logs = logits.float().log_softmax(-1)
                    parts.append(logs.topk(min(count, logs.shape[-1]), dim=-1))
                    del logits, logs
                ids = torch.cat([part.indices for part in parts], dim=1)[:, : hidden.shape[1] - 1]
                values = torch.cat([part.values for part in parts], dim=1)[:, : hidden.shape[1] - 1]
                yield ids.int().cpu(), values.cpu()
                one.advance()
