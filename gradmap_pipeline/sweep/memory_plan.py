"""How a sweep uses the memory it may have: what stays, what goes to a file, in how many parts the samples go.

Everything is in bytes of resident memory. Sizes: T tokens a sample, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..batches import BATCH_TOKENS
from ..errors import CapacityError
from ..machine.memory import free_bytes

if TYPE_CHECKING:
    import torch

    from .layerwise import LayerwiseModel

LOGIT_BYTES = 16
"""A loss, its gradient and their temporaries, for each logit held at once."""
_WORK = 1.5
"""Working memory of a layer over what autograd saves of it: gradients on their way down."""
_SLACK = 96 << 20
"""Allocator fragments, thread buffers, Python objects."""


@dataclass(frozen=True)
class SweepNeeds:
    """What a sweep over some samples would take."""

    samples: int
    tokens: int
    """In a sample."""
    layers: int
    layer_bytes: int
    """Of the largest layer."""
    all_layer_bytes: int
    stored_bytes: int
    """Of all layers on disk."""
    boundary_bytes: int
    """Of one sample at one boundary."""
    saved_bytes: int
    """What autograd saves of one sample in one layer."""
    logits_bytes: int
    """Of the head, for the logits it holds at once."""
    backward: bool = True
    weight_gradients: bool = False
    keep_boundaries: bool = True
    """All of them, not just the one the sweep stands at."""
    read_ahead: bool = True
    """Whether reading waits for a disk or a bus; out of the system's cache it takes the processor from computing."""


@dataclass(frozen=True)
class SweepPlan:
    """How to do it."""

    resident: bool
    """Layers stay in memory."""
    prefetch: bool
    """The next layer is read while this one computes."""
    batch_samples: int
    parts: int
    """The samples go through the model in this many parts, one after another."""
    keep_graphs: bool
    boundary_limit: int
    """Bytes of boundaries held in memory."""
    peak_bytes: int
    """Above what the process has before."""
    bytes_read: int
    bytes_written: int

    def describe(self) -> str:
        """In a few words."""
        layers = "layers stay in memory" if self.resident else "layers read ahead" if self.prefetch else "layers read again"
        parts = f"samples in {self.parts} parts" if self.parts > 1 else ""
        spilled = f"{format_size(self.bytes_written)} of hidden states to a file" if self.bytes_written else ""
        return ", ".join(filter(None, (layers, "graphs kept" if self.keep_graphs else "", parts, spilled)))


def plan_sweep(needs: SweepNeeds, free: int, *, divisible: bool = True, reserve: int = 0) -> SweepPlan:
    """The fastest way that fits into `free` bytes.

    `divisible` False: what is computed is no sum over samples, so they must go through together.
    `reserve`: bytes of those that are better left free than used to read ahead.
    Raises `CapacityError` when the largest layer and one sample do not fit.
    """
    work = math.ceil(needs.saved_bytes * _WORK) if needs.backward else needs.saved_bytes
    # Gradients of weights: sums in fp32, and one in the computed type.
    layer = needs.layer_bytes * (4 if needs.weight_gradients else 1)
    least = layer + needs.logits_bytes + work + 2 * needs.boundary_bytes + _SLACK
    if least > free:
        raise CapacityError(
            f"one layer ({format_size(layer)}), one sample of {needs.tokens} tokens ({format_size(work)}) and its logits "
            f"({format_size(needs.logits_bytes)}) need {format_size(least)}, and of the memory allowed "
            f"{format_size(max(free, 0))} are left; shorten 'sequence_length', use --dtype bfloat16, or allow more with --memory"
        )
    resident = least - needs.layer_bytes + needs.all_layer_bytes <= free
    held = least + (needs.all_layer_bytes - needs.layer_bytes if resident else 0)
    batch = max(1, min(needs.samples, BATCH_TOKENS // needs.tokens, 1 + (free - held) // 3 // max(work, 1)))
    held += (batch - 1) * work
    left = free - held
    boundaries = needs.boundary_bytes * (needs.layers + 1 if needs.keep_boundaries else 2)  # of one sample
    graphs = needs.saved_bytes * needs.layers
    keep_graphs = resident and needs.backward and (boundaries + graphs) * (batch if divisible else needs.samples) <= left
    prefetch = needs.read_ahead and not resident and needs.samples * boundaries + reserve + needs.layer_bytes <= left
    if prefetch:
        held, left = held + needs.layer_bytes, left - needs.layer_bytes
    each = boundaries + graphs if keep_graphs else boundaries
    fitting = min(needs.samples, max(1, left // each // batch) * batch)
    parts = math.ceil(needs.samples / fitting) if divisible else 1
    passes = 2 if needs.backward else 1
    again = 0 if resident else (parts - 1) * passes * needs.stored_bytes
    over = max(0, needs.samples * boundaries - left) * (1 if needs.keep_boundaries else needs.layers)
    if parts > 1 and not keep_graphs and 2 * over <= again:
        parts, again, fitting = 1, 0, needs.samples
    written = 0 if parts > 1 or keep_graphs else over
    return SweepPlan(
        resident=resident,
        prefetch=prefetch,
        batch_samples=batch,
        parts=parts,
        keep_graphs=keep_graphs,
        boundary_limit=left,
        peak_bytes=held + min(left, fitting * each),
        bytes_read=needs.stored_bytes * (1 if resident else passes) + again + written,
        bytes_written=written,
    )


def measure_needs(
    model: LayerwiseModel,
    samples: int,
    tokens: int,
    *,
    backward: bool = True,
    weight_gradients: bool = False,
    keep_boundaries: bool = True,
) -> SweepNeeds:
    """Needs of a model that is about to be swept; runs one sample through one layer to see what autograd saves."""
    import torch

    from ..batches import Batch
    from .layerwise import LOGITS_AT_ONCE

    graph, size = model.graph, model.dtype.itemsize
    elements = graph.layer_elements()
    stored = sum(tensor.size for layer in graph.layers for tensor in graph.layer_tensors(layer).values())
    ids = torch.zeros(1, tokens, dtype=torch.long)
    hidden, arguments = model.record(Batch(ids, torch.ones(1, tokens, dtype=torch.bool)))
    largest = max(elements, key=elements.__getitem__)
    words = int(model.module.config.get_text_config().vocab_size)
    return SweepNeeds(
        samples=samples,
        tokens=tokens,
        layers=len(graph.layers),
        layer_bytes=elements[largest] * size,
        all_layer_bytes=sum(elements.values()) * size,
        stored_bytes=stored,
        boundary_bytes=hidden.nbytes,
        saved_bytes=_measure_saved(model, largest, hidden, arguments[largest]),
        logits_bytes=LOGIT_BYTES * min(LOGITS_AT_ONCE, max(tokens, BATCH_TOKENS) * words),
        backward=backward,
        weight_gradients=weight_gradients,
        keep_boundaries=keep_boundaries,
        read_ahead=model.device.type == "cuda" or stored > free_bytes(),
    )


def _measure_saved(model: LayerwiseModel, layer: int, hidden: torch.Tensor, arguments: object) -> int:
    """Bytes that autograd keeps for one layer besides its weights, each storage once."""
    import torch

    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with model.layer(layer) as module:
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model.run_layer(layer, hidden.detach().requires_grad_(), arguments)  # type: ignore[arg-type]
        return sum(size for place, size in saved.items() if place not in weights) + output.nbytes


def format_size(size: int) -> str:
    """For people: `0.39 GiB`, `12 MiB`, `80 KiB`."""
    if size >= 2**28:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
