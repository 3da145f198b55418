"""Batches pushed through a model with one layer in memory, forward and backward."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from gradmap_pipeline import (
    Batch,
    ModelSource,
    ProcessGroup,
    SamplePass,
    Sweep,
    count_predicted,
    explain_nonfinite,
    find_nonfinite_weights,
    find_top_choices,
    make_batches,
    next_token_losses,
    open_model,
    open_sweep,
    perplexity_of,
    predicted_tokens,
)
from gradmap_pipeline.testing import make_context

model = open_model(ModelSource(builtin="docs-llama"))
context = make_context(Path("step"))
ids = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[0, 10:] = 0  # padding


def sum_updates(sweep: Sweep | SamplePass) -> dict[int, float]:
    """Forward, in a sweep or in one of the passes that rankings get.

    Each visit has a layer's input and output (B, T, D) for a batch, and its mask (B, T).
    """
    return {
        step.layer: sum(float((visit.output - visit.input).norm(dim=-1)[visit.mask].sum()) for visit in step)
        for step in sweep.forward()
    }


with open_sweep(model, (ids, mask), context) as sweep:
    batches: Sequence[Batch] = sweep.batches
    updates = sum_updates(sweep)
    total = sum(float(losses.double().sum()) for losses in sweep.losses())
assert list(updates) == list(model.layers)
loss = total / count_predicted(batches)
assert perplexity_of(loss, "random tokens") == math.exp(loss)

# The likeliest next tokens at each position, and the logarithms of their probabilities (B, T-1, K).
with open_sweep(model, (ids, mask), context) as sweep:
    choices, logs = next(find_top_choices(sweep, 3))
assert choices.shape == logs.shape == (len(batches[0].input_ids), 15, 3)
assert bool((logs.diff(dim=-1) <= 0).all())

# The same loss by hand, from the logits (B, T, V) of the model in one piece.
run = model.open("cpu")
by_hand = sum(float(next_token_losses(run(batch), batch).double().sum()) for batch in make_batches(ids, mask))
assert math.isclose(by_hand, total, rel_tol=1e-4)
assert int(predicted_tokens(batches[0]).sum()) <= count_predicted(batches) == 3 * 15 + 9

# Backward: each visit has the gradient of the mean loss at the layer's output, too.
with open_sweep(model, (ids, mask), context, need="backward") as sweep:
    for _ in sweep.losses():
        pass
    gradients = {step.layer: sum(float(visit.gradient.norm()) for visit in step) for step in sweep.backward()}
assert set(gradients) == set(model.layers)

# Several processes share the samples; a group sums what each has.
group: ProcessGroup = context.group
with group.at("the loss"):  # two that are at different places say so, and sum nothing
    assert group.sum_values({"loss": total}) == {"loss": total}
assert group.least(7) == 7  # decide by what all have, never by what one sees

# Where a result is not finite, these say which tensor or which layer it comes from.
assert find_nonfinite_weights(model) is None
assert explain_nonfinite("the loss", [model], batches, context.device, context.dtype) is None
