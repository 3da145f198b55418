"""Bring the residual stream of a pruned model back to its size at each cut, inside the weights that write to it above.

Multiplying the stream by s at a cut, and dividing it by s where it leaves the last layer, which the final norm does not see, is
dividing by s all that is written above the cut (`writers`). Embeddings and head stay as they are, so tied ones do.
Sizes: B sequences, T tokens, N tokens that are not padding, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import StageError
from .patches import write_patches
from .sites import NotFiniteError
from .writers import divide_writers

if TYPE_CHECKING:
    import torch

    from ..artifacts import TensorFile
    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from .streams import Streams

Ratio = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], tuple[float, float]]
"""Of pruned and original hidden states (B, T, D) and a mask bool (B, T): two sums, over whose quotient the scale is."""


def nearest_scale(pruned: torch.Tensor, original: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Sums whose quotient s minimises Σ ‖s h' - h‖² / ‖h‖² over tokens: tokens count alike, however large a few of them are."""
    drifted, target = pruned[mask].double(), original[mask].double()
    weights = 1 / target.square().sum(-1).clamp_min(1e-300)
    return float(((drifted * target).sum(-1) * weights).sum()), float((drifted.square().sum(-1) * weights).sum())


def magnitude_ratio(pruned: torch.Tensor, original: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Σ over samples of the mean over channels of mean_t |h_c| / mean_t |h'_c|, and the samples: Prune&Comp's magnitude gap."""
    real = mask[..., None].double()
    sizes = [(hidden.double().abs() * real).sum(1) / real.sum(1) for hidden in (pruned, original)]  # (B, D)
    return float((sizes[1] / sizes[0].clamp_min(1e-12)).mean(-1).sum()), float(len(mask))


def rescale_stream(streams: Streams, ratio: Ratio, context: Context) -> tuple[dict[int, float], dict[str, TensorFile]]:
    """Rescale at every cut, from the bottom up, each measured with those below in place. `streams.writers` must be there.

    Returns the scales by the base layer above the cut (the number of layers, where the last ones are removed), in units of the
    original's stream, and the patched tensors.
    """
    scales: dict[int, float] = {}
    patches: dict[str, TensorFile] = {}
    for position, layer in list_cuts(streams.graph):
        scales[layer] = measure_scale(streams, position, layer, ratio)
        patches |= rescale_from(streams, position, scales[layer], context)
    return scales, patches


def list_cuts(graph: ModelGraph) -> Iterator[tuple[int, int]]:
    """Position and base layer of each kept layer right above removed ones; at the top, the numbers of kept and of all layers."""
    for position, layer in enumerate((*graph.layers, graph.base.layers)):
        if layer - 1 in graph.removed:
            yield position, layer


def measure_scale(streams: Streams, position: int, layer: int, ratio: Ratio) -> float:
    """What the pruned stream that enters a base layer, at `position` among those kept, is to be multiplied by."""
    pruned, sums = streams.pruned, {"above": 0.0, "below": 0.0}
    if position < len(streams.graph.layers):
        pruned.run_up_to(layer)
    else:
        pruned.run_forward()
    for index, batch in enumerate(pruned.batches):
        hidden = pruned.boundary(position, index)
        above, below = ratio(hidden, streams.entering(layer, index), batch.mask.to(hidden.device))
        sums["above"] += above
        sums["below"] += below
    sums = streams.group.sum_values(sums)
    scale = sums["above"] / max(sums["below"], 1e-300)
    if not math.isfinite(scale):
        raise NotFiniteError(f"the size of what enters layer {layer}")
    if scale <= 0:
        raise StageError(
            f"what enters layer {layer} points away from the original ({scale:.3g} times it comes nearest); set rescale: false"
        )
    return scale


def rescale_from(streams: Streams, position: int, scale: float, context: Context) -> dict[str, TensorFile]:
    """Divide what is written from a position among kept layers up to the next cut by a scale, and count it up to the top.

    Returns the patched tensors by name.
    """
    graph = streams.graph
    above = graph.layers[position:]
    streams.scales |= dict.fromkeys((*above, graph.base.layers), scale)
    patches: dict[str, TensorFile] = {}
    for layer in above:
        if layer != above[0] and layer - 1 in graph.removed:
            break
        if layer not in streams.writers:
            raise StageError(
                f"layer {layer} is too large to find what writes in it; allow more with --memory, or set rescale: false"
            )
        with streams.pruned.model.layer(layer) as module:
            divided = divide_writers(module, streams.writers[layer], scale)
        patches |= write_patches(streams, layer, divided, context)
    return patches
