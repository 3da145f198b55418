"""Where numbers come from that are not finite: looked for only once there are some, since it takes a pass of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..batches import Batch
from ..checkpoint.architecture import layer_of
from ..checkpoint.checkpoint import StoredTensor, read_chunks
from ..errors import StageError

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph

_HELD = 64 << 20  # bytes of hidden states in memory, the rest in a file


def find_tensor(graph: ModelGraph, names: Iterable[str]) -> str | None:
    """What to say of the first of these tensors that holds a number that is not finite; None where all are finite."""
    for name in names:
        stored = graph.stored_tensor(name)
        count = _count(stored) if stored.is_float else 0
        if count:
            layer = layer_of(name, graph.base.layer_prefix)
            place = "" if layer is None else f" of layer {layer}"
            made = ", which an earlier step corrected," if name in graph.patches else ""
            return (
                f"the tensor {name!r}{place}{made} has {count:,} of {stored.elements:,} values that are not finite "
                f"({str(stored.file)!r}); take a checkpoint without them"
            )
    return None


def find_nonfinite_weights(graph: ModelGraph) -> str | None:
    """What to say of the first tensor of a model that holds a number that is not finite; None where all are finite.

    Tensors of layers that are left out are not looked at.
    """
    return find_tensor(graph, names_of(graph))


def names_of(graph: ModelGraph) -> list[str]:
    """Names in the base checkpoint of all tensors of a model."""
    kept = {None, *graph.layers}
    return [name for name in graph.base.tensors if layer_of(name, graph.base.layer_prefix) in kept]


def find_cause(graph: ModelGraph, batches: Sequence[Batch], device: str, dtype: str, folder: Path | None = None) -> str | None:
    """Why a model computes numbers that are not finite on these tokens, in one sentence; None where logits are finite.

    Names the tensor that is not finite where the first such hidden states or logits come from, else that place and the type to
    compute in. `folder`: for hidden states that do not fit into memory.
    """
    place = _find_place(graph, batches, device, dtype, folder)
    if place == "nowhere":
        return None
    prefix = graph.base.layer_prefix
    inside = [name for name in names_of(graph) if layer_of(name, prefix) == (place if isinstance(place, int) else None)]
    said = find_tensor(graph, inside)
    if said is not None:
        return said
    where = f"the output of layer {place} is" if isinstance(place, int) else f"the {place} are"
    wider = "; use --dtype float32 or bfloat16" if dtype == "float16" else ""
    return f"{where} not finite in {dtype}, though the weights there are{wider}"


def explain_nonfinite(
    what: str, graphs: Sequence[ModelGraph], batches: Sequence[Batch], device: str, dtype: str, folder: Path | None = None
) -> StageError | None:
    """The error that tells why `what` is not finite, by the first of the models that says; None where all logits are finite.

    `batches`: the tokens on which it is not. `device`, `dtype`: to compute in, as `Context` has them. `folder`: for hidden states
    that do not fit into memory.
    """
    for graph in graphs:
        cause = find_cause(graph, batches, device, dtype, folder)
        if cause is not None:
            return StageError(f"{what} is not a finite number: {cause}")
    return None


def _find_place(graph: ModelGraph, batches: Sequence[Batch], device: str, dtype: str, folder: Path | None) -> int | str:
    import torch

    from .head_losses import slice_positions
    from .kept_tensors import KeptTensors
    from .layerwise import LayerwiseModel
    from .sample_pass import SamplePass

    model = LayerwiseModel(graph, device=device, dtype=dtype, resident_bytes=0)
    sweep = SamplePass(model, batches, kept=KeptTensors(_HELD, folder), keep_boundaries=False)
    for index, batch in enumerate(batches):
        hidden = sweep.boundary(0, index)
        if not hidden[batch.mask.to(hidden.device)].isfinite().all():
            return "embeddings of the tokens"
    for step in sweep.forward():
        for visit in step:
            if not visit.output[visit.mask].isfinite().all():
                return step.layer
    with torch.no_grad(), model.weights.head():
        for index, batch in enumerate(batches):
            for positions in slice_positions(model, batch):
                logits = model.head(batch, sweep.boundary(len(graph.layers), index), positions)
                if not logits[batch.mask[:, positions].to(logits.device)].isfinite().all():
                    return "logits"
    return "nowhere"


def _count(stored: StoredTensor) -> int:
    return sum(int((~chunk.isfinite()).sum()) for chunk in read_chunks(stored))
