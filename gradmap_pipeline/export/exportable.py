"""The graph that an exporter writes for a model of any class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..batches import Batch
from ..checkpoint.graph import ModelGraph
from ..errors import StageError, add_article

if TYPE_CHECKING:
    import torch

    from ..checkpoint.model import ExportableModel
    from ..context import Context

_SHAPE = (2, 48)  # sequences, tokens
_TOLERANCE = 1e-3
"""Largest difference accepted, in parts of the largest logit: float32 in another order of sums."""


def take_graph(model: ExportableModel, context: Context) -> ModelGraph:
    """The graph of a model. Raises `StageError` where a model of another class computes other logits than its graph.

    Such a model is opened whole, on the device of the step, for two random sequences of 48 tokens.
    """
    if isinstance(model, ModelGraph):
        return model
    import torch

    from ..checkpoint.pretrained import read_config

    name, graph = type(model).__name__, model.graph
    words = int(read_config(graph.base.folder).get_text_config().vocab_size)
    ids = torch.randint(words, _SHAPE, generator=torch.Generator().manual_seed(context.seed))
    own = model.open(context.device)(Batch(ids, torch.ones_like(ids, dtype=torch.bool))).float().cpu()
    expected = _compute_logits(graph, ids, context)
    accepted = _TOLERANCE * max(1.0, float(expected.abs().max()))
    if own.shape != expected.shape:
        found = f"have shape {tuple(own.shape)}, those of its graph {tuple(expected.shape)}"
    elif not (difference := float((own - expected).abs().max())) <= accepted:
        found = f"differ from those of its graph by {difference:.3g} (accepted: {accepted:.3g})"
    else:
        return graph
    raise StageError(
        f"{add_article(name)} cannot be exported: its class says `computes_graph`, but its logits {found}; put the change into "
        "tensors of the graph, or write an exporter for this class"
    )


def _compute_logits(graph: ModelGraph, ids: torch.Tensor, context: Context) -> torch.Tensor:
    import torch

    from ..sweep.sweep import open_sweep

    with open_sweep(graph, (ids, torch.ones_like(ids)), context, dtype="float32") as sweep:
        return torch.cat([logits.float().cpu() for logits in sweep.logits()])
