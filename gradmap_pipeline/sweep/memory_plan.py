"""How a sweep uses the memory it may have: what stays, what goes to a file, in how many passes the samples go.

Everything is in bytes of resident memory. Sizes: T tokens a sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..batches import BATCH_TOKENS, Batch
from ..errors import CapacityError
from ..machine.memory import free_bytes
from .ledger import Line

if TYPE_CHECKING:
    import torch

    from .layer_arguments import LayerArguments
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
    words: int
    """V"""
    logits_at_once: int
    """Logits that the head holds at once, unless one position of a batch has more."""
    layer_elements: int = 0
    """Parameters of the largest layer."""
    largest_parameter: int = 0
    """Elements of a layer's largest parameter."""
    largest_tensor_bytes: int = 0
    """Of the largest tensor of a layer, as it is stored and as it is computed with: what loading holds besides the layer."""
    argument_bytes: int = 0
    """What a layer is called with besides hidden states, of one sample."""
    fixed_argument_bytes: int = 0
    """The same, of a batch of any size."""
    padded: bool = False
    """Whether samples have padding, so that each batch is called with masks of its own."""
    backward: bool = True
    weight_gradients: bool = False
    keep_boundaries: bool = True
    """All of them, not just the one the sweep stands at."""
    has_head: bool = True
    """Whether logits are computed."""
    read_ahead: bool = True
    """Whether reading waits for a disk or a bus; out of the system's cache it takes the processor from computing."""

    def count_logit_bytes(self, batch: int) -> int:
        """Of the logits of a batch that are held at once."""
        if not self.has_head:
            return 0
        positions = max(1, min(self.tokens, self.logits_at_once // (batch * self.words)))
        return LOGIT_BYTES * batch * positions * self.words

    def count_work(self, batch: int) -> int:
        """What one layer computes of a batch, what goes in and what comes out."""
        saved = math.ceil(self.saved_bytes * _WORK) if self.backward else self.saved_bytes
        return batch * (saved + (3 if self.backward else 2) * self.boundary_bytes)

    def count_own_arguments(self, batch: int) -> int:
        """What a layer is called with, of each sample, where every batch has masks of its own."""
        return self.argument_bytes + math.ceil(self.fixed_argument_bytes / batch) if self.padded else 0

    @property
    def weight_gradient_bytes(self) -> int:
        """Sums in fp32 of a layer's gradients, one batch's in the computed type, and what is made of the largest in fp64."""
        return 4 * self.layer_elements + self.layer_bytes + 24 * self.largest_parameter if self.weight_gradients else 0

    @property
    def kept_bytes(self) -> int:
        """Of one sample between layers: hidden states at the boundaries, and a gradient or a stream without a layer."""
        return self.boundary_bytes * (self.layers + 2 if self.keep_boundaries else 1)


@dataclass(frozen=True)
class SweepPlan:
    """How a sweep uses its memory: what stays, what spills, in how many passes."""

    resident: bool
    """Layers stay in memory."""
    prefetch: bool
    """The next layer is read while this one computes."""
    batch_samples: int
    passes: int
    """The samples go through the model in this many parts, one after another."""
    keep_graphs: bool
    kept_limit: int
    """Bytes held in memory of what is kept between layers."""
    peak_bytes: int
    """Above what the process has before: the sum of `lines`, and what the allocator needs."""
    bytes_read: int
    bytes_written: int
    spilled_bytes: int = 0
    """Of what is kept, in a file at a time."""
    lines: dict[Line, int] = field(default_factory=dict, compare=False)
    """Bytes by what they are for, at the moment when the sum is largest."""

    def describe(self) -> str:
        """In a few words."""
        layers = "layers stay in memory" if self.resident else "layers read ahead" if self.prefetch else "layers read again"
        passes = f"samples in {self.passes} passes" if self.passes > 1 and not self.resident else ""
        spilled = f"{format_size(self.bytes_written)} of hidden states to a file" if self.bytes_written else ""
        return ", ".join(filter(None, (layers, "graphs kept" if self.keep_graphs else "", passes, spilled)))


def plan_sweep(needs: SweepNeeds, free: int, *, divisible: bool = True, reserve: int = 0) -> SweepPlan:
    """The fastest plan that fits into `free` bytes.

    `divisible` False: what is computed is no sum over samples, so they must go through together.
    `reserve`: bytes of those that are better left free than used to read ahead.
    Raises `CapacityError` when the largest layer and one sample do not fit.
    """
    layer = needs.layer_bytes + needs.weight_gradient_bytes
    least = _count_phases(needs, 1, needs.layer_bytes)
    if sum(least.values()) + _SLACK > free:
        raise CapacityError(
            f"one layer ({format_size(layer)}), one sample of {needs.tokens} tokens ({format_size(needs.count_work(1))}) and its "
            f"logits ({format_size(needs.count_logit_bytes(1))}) need {format_size(sum(least.values()) + _SLACK)}, and of the "
            f"memory allowed {format_size(max(free, 0))} are left; shorten 'sequence_length', use --dtype bfloat16, or allow more "
            "with --memory"
        )
    resident = sum(_count_phases(needs, 1, needs.all_layer_bytes).values()) + _SLACK <= free
    weights = needs.all_layer_bytes if resident else needs.layer_bytes
    batch = _choose_batch(needs, free, weights)
    lines = _count_phases(needs, batch, weights)
    held = sum(lines.values()) + _SLACK
    left = free - held
    kept = needs.kept_bytes + needs.count_own_arguments(batch)
    graphs = needs.saved_bytes * needs.layers
    keep_graphs = resident and needs.backward and (kept + graphs) * (batch if divisible else needs.samples) <= left
    prefetch = needs.read_ahead and not resident and needs.samples * kept + reserve + needs.layer_bytes <= left
    if prefetch:
        lines["read ahead"] = needs.layer_bytes
        held, left = held + needs.layer_bytes, left - needs.layer_bytes
    each = kept + graphs if keep_graphs else kept
    fitting = min(needs.samples, max(1, left // each // batch) * batch)
    passes = math.ceil(needs.samples / fitting) if divisible else 1
    sweeps = 2 if needs.backward else 1
    again = 0 if resident else (passes - 1) * sweeps * needs.stored_bytes
    spilled = max(0, needs.samples * kept - left)
    # What finds no room of the gradients is written anew at each layer, and so is the boundary of a sweep that keeps one.
    gradients = max(0, needs.samples * needs.boundary_bytes - left) * needs.layers if needs.backward else 0
    written = spilled * (1 if needs.keep_boundaries else needs.layers) + gradients
    if passes > 1 and not keep_graphs and 2 * written <= again:
        passes, again, fitting = 1, 0, needs.samples
    if divisible and resident and not needs.keep_boundaries:  # a layer that stays costs nothing to use again
        passes, fitting = math.ceil(needs.samples / batch), batch
    if passes > 1 or keep_graphs:
        spilled = written = 0
    for line, size in _split_kept(needs, fitting, needs.count_own_arguments(batch), left).items():
        lines[line] = lines.get(line, 0) + size
    if keep_graphs:
        lines["activations"] = lines.get("activations", 0) + fitting * graphs
    return SweepPlan(
        resident=resident,
        prefetch=prefetch,
        batch_samples=batch,
        passes=passes,
        keep_graphs=keep_graphs,
        kept_limit=left,
        peak_bytes=sum(lines.values()) + _SLACK,
        bytes_read=needs.stored_bytes * (1 if resident else sweeps) + again + written,
        bytes_written=written,
        spilled_bytes=spilled,
        lines=lines,
    )


def _choose_batch(needs: SweepNeeds, free: int, weights: int) -> int:
    """As many samples as make a batch of the usual size, and take no more than a third of what is free beside one."""
    room = (free - sum(_count_phases(needs, 1, weights).values()) - _SLACK) // 3
    most = max(1, min(needs.samples, BATCH_TOKENS // needs.tokens, 1 + room // max(needs.count_work(1), 1)))
    while most > 1 and sum(_count_phases(needs, most, weights).values()) + _SLACK > free:
        most -= 1
    return most


def _count_phases(needs: SweepNeeds, batch: int, weights: int) -> dict[Line, int]:
    """Bytes by line while a layer works, while the head does, or while a layer is loaded: of those the most."""
    arguments = 0 if needs.padded else 2 * (needs.fixed_argument_bytes + batch * needs.argument_bytes)  # the last batch is smaller
    common: dict[Line, int] = {"layer weights": weights, "layer arguments": arguments}
    at_layer: dict[Line, int] = {"activations": needs.count_work(batch), "weight gradients": needs.weight_gradient_bytes}
    at_head: dict[Line, int] = {"logits": needs.count_logit_bytes(batch), "activations": 3 * batch * needs.boundary_bytes}
    loading: dict[Line, int] = {"read ahead": needs.largest_tensor_bytes}
    phase = max((at_layer, at_head, loading), key=lambda lines: sum(lines.values()))
    return {line: size for line, size in (common | phase).items() if size}


def _split_kept(needs: SweepNeeds, samples: int, arguments: int, limit: int) -> dict[Line, int]:
    """What is held between layers of so many samples, by line: arguments and gradients first, they are used most often."""
    wanted: dict[Line, int] = {}
    if needs.padded:
        wanted["layer arguments"] = samples * arguments
    if needs.backward:
        wanted["gradients"] = samples * needs.boundary_bytes
    wanted["hidden states"] = samples * needs.kept_bytes - wanted.get("gradients", 0)
    lines: dict[Line, int] = {}
    for line, size in wanted.items():
        lines[line] = min(size, limit)
        limit -= lines[line]
    return lines


def measure_needs(
    model: LayerwiseModel,
    samples: int,
    tokens: int,
    *,
    backward: bool = True,
    weight_gradients: bool = False,
    keep_boundaries: bool = True,
    padded: bool = False,
    has_head: bool = True,
) -> SweepNeeds:
    """Needs of a model that is about to be swept; runs one sample through one layer to see what autograd saves."""
    from ..checkpoint.adapter import count_conversion_copies
    from .layer_arguments import count_bytes
    from .layerwise import LOGITS_AT_ONCE

    graph, size = model.graph, model.dtype.itemsize
    elements = graph.layer_elements()
    largest = max(elements, key=elements.__getitem__)
    hidden, arguments = model.record(_make_batch(1, tokens, padded=padded and not model.lengths_apart))
    one = count_bytes(arguments.values())
    more = model.record(_make_batch(2, tokens, padded=padded and not model.lengths_apart))[1]
    each = max(0, count_bytes(more.values()) - one)
    del more
    tensors = [tensor for layer in graph.layers for tensor in graph.layer_tensors(layer).values()]
    one_by_one = max(tensor.size + tensor.elements * size for tensor in tensors)
    needs = SweepNeeds(
        samples=samples,
        tokens=tokens,
        layers=len(graph.layers),
        layer_bytes=elements[largest] * size,
        all_layer_bytes=sum(elements.values()) * size,
        stored_bytes=sum(tensor.size for tensor in tensors),
        boundary_bytes=hidden.nbytes,
        saved_bytes=_measure_saved(model, largest, hidden, arguments[largest]),
        words=model.words,
        logits_at_once=LOGITS_AT_ONCE if model.can_slice_logits else tokens * model.words * samples,
        layer_elements=elements[largest],
        largest_parameter=max(parameter.numel() for parameter in model.parameters_of(largest)),
        largest_tensor_bytes=max(one_by_one, elements[largest] * size * count_conversion_copies(model.module)),
        argument_bytes=each,
        fixed_argument_bytes=max(0, one - each),
        padded=padded,
        backward=backward,
        weight_gradients=weight_gradients,
        keep_boundaries=keep_boundaries,
        has_head=has_head,
    )
    return replace(needs, read_ahead=model.device.type == "cuda" or needs.stored_bytes > free_bytes())


def _make_batch(samples: int, tokens: int, *, padded: bool) -> Batch:
    import torch

    mask = torch.ones(samples, tokens, dtype=torch.bool)
    mask[:, tokens - 1] = not (padded and tokens > 1)
    return Batch(torch.zeros(samples, tokens, dtype=torch.long), mask)


def _measure_saved(model: LayerwiseModel, layer: int, hidden: torch.Tensor, arguments: LayerArguments) -> int:
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
            output = model.run_layer(layer, hidden.detach().requires_grad_(), arguments)
        return sum(size for place, size in saved.items() if place not in weights) + output.nbytes


def format_size(size: int) -> str:
    """For people: `0.39 GiB`, `12 MiB`, `80 KiB`."""
    if size >= 2**28:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
