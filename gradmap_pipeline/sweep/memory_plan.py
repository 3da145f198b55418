"""How a sweep uses the memory it may have: what stays, what goes to a file, in how many passes the samples go.

Everything is in bytes of resident memory. Sizes: T tokens a sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..batches import BATCH_TOKENS
from ..checkpoint.checkpoint import item_bytes
from ..machine.memory_advice import lack_of_memory
from .head_losses import LOGIT_BYTES, LOGITS_AT_ONCE
from .ledger import Line
from .needs import SweepNeeds

_SLACK = 96 << 20
"""Allocator fragments, thread buffers, Python objects."""
_OPENING = 256 << 20
"""Opening a model takes about so many bytes, with the allocator; a message counts them before they are known."""
_HOST_SLACK = 64 << 20
"""Of the same in the machine's memory, where a GPU computes."""


@dataclass(frozen=True)
class SweepPlan:
    """How a sweep uses its memory: what stays, what spills, in how many passes."""

    is_resident: bool
    """Layers stay in memory."""
    reads_ahead: bool
    """The next layer is read while this one computes."""
    batch_samples: int
    passes: int
    """The samples go through the model in this many parts, one after another."""
    keeps_graphs: bool
    kept_limit: int
    """Bytes held in memory of what is kept between layers."""
    peak_bytes: int
    """Above what the process has before: the sum of `lines`, and what the allocator needs."""
    bytes_read: int
    bytes_written: int
    reads_once: bool = False
    """No layer is read twice."""
    host_limit: int = 0
    """Bytes of it held besides in the machine's memory, where the device is a GPU."""
    spilled_bytes: int = 0
    """Bytes of what is kept that are in a file at a time."""
    lines: dict[Line, int] = field(default_factory=dict, compare=False)
    """Bytes by what they are for, at the moment when the sum is largest."""

    def count_traffic(self, passes: float) -> float:
        """Bytes read and written by so many passes through all layers."""
        return self.bytes_read if self.is_resident else passes * (self.bytes_read + self.bytes_written)

    def describe(self) -> str:
        """The plan in a few words."""
        read = "layers read ahead" if self.reads_ahead else "each layer read once" if self.reads_once else "layers read again"
        layers = "layers stay in memory" if self.is_resident else read
        passes = f"samples in {self.passes} passes" if self.passes > 1 and not self.is_resident else ""
        spilled = f"{format_size(self.bytes_written)} of hidden states to a file" if self.bytes_written else ""
        return ", ".join(filter(None, (layers, "graphs kept" if self.keeps_graphs else "", passes, spilled)))


def plan_sweep(
    needs: SweepNeeds, free: int, *, divisible: bool = True, reserve: int = 0, host_free: int = 0, held: int = 0
) -> SweepPlan:
    """The fastest plan that fits into `free` bytes.

    `divisible` False: what is computed is not a sum over samples, so they must go through together.
    `reserve`: bytes of those that are better left free than used to keep layers or to read ahead. `host_free`: bytes in the
    machine's memory, where the device has its own. `held`: bytes that the process has besides, for messages.
    Raises `CapacityError` when the largest layer and one sample do not fit.
    """
    least = _count_phases(needs, 1, is_resident=False)
    if sum(least.values()) + _SLACK > free:
        needed = sum(least.values()) + _SLACK
        held_for = [*least.items(), ("allocator", _SLACK)]
        largest = sorted(((size, str(line)) for line, size in held_for if size >= 1 << 20), reverse=True)
        raise lack_of_memory(
            f"one sample of {needs.tokens} tokens at a time takes {format_size(needed)} "
            f"({', '.join(f'{line} {format_size(size)}' for size, line in largest)}) beside the {format_size(held)} of the program "
            f"itself, over the {format_size(free + held)} allowed",
            needed + reserve + held,
            dtype="float32" if needs.item_bytes > 2 else "",
            by_option={"sequence_length": "shorten 'sequence_length'"},
        )
    staying = sum(_count_phases(needs, 1, is_resident=True).values()) + _SLACK + reserve
    is_resident = staying <= free and not needs.uses_layers_once
    batch = _choose_batch(needs, free, is_resident=is_resident)
    lines = _count_phases(needs, batch, is_resident=is_resident)
    held = sum(lines.values()) + _SLACK
    left = free - held
    kept = needs.kept_bytes + needs.count_own_arguments(batch)
    graphs = needs.saved_bytes * needs.layers
    keeps_graphs = is_resident and needs.is_backward and (kept + graphs) * (batch if divisible else needs.samples) <= left
    reads_ahead = needs.has_slow_reads and not is_resident and needs.samples * kept + reserve + needs.layer_bytes <= left
    if reads_ahead:
        lines["read ahead"] = needs.layer_bytes
        held, left = held + needs.layer_bytes, left - needs.layer_bytes
    each = kept + graphs if keeps_graphs else kept
    # Layers go through pinned memory: the one that is read ahead, in blocks of up to twice its size. So are what is kept.
    host_limit = max(0, host_free - _HOST_SLACK - (2 * needs.layer_bytes if reads_ahead else needs.largest_tensor_bytes))
    room = left + host_limit // 2
    fitting = min(needs.samples, max(1, (left if keeps_graphs else room) // each // batch) * batch)
    passes = math.ceil(needs.samples / fitting) if divisible else 1
    sweeps = 2 if needs.is_backward else 1
    ends = needs.stored_embedding_bytes + (needs.stored_head_bytes if needs.has_head else 0)
    again = 0 if is_resident else (passes - 1) * (sweeps * needs.stored_bytes + ends)
    spilled = max(0, needs.samples * kept - room)
    # What finds no room of the gradients is written anew at each layer, and so is the boundary of a sweep that keeps one.
    gradients = max(0, needs.samples * needs.boundary_bytes - room) * needs.layers if needs.is_backward else 0
    written = spilled * (1 if needs.keeps_boundaries else needs.layers) + gradients
    if passes > 1 and not keeps_graphs and 2 * written <= again:
        passes, again, fitting = 1, 0, needs.samples
    if divisible and is_resident and not needs.keeps_boundaries:  # a layer that stays costs nothing to use again
        passes, fitting = math.ceil(needs.samples / batch), batch
    if passes > 1 or keeps_graphs:
        spilled = written = 0
    for line, size in _split_kept(needs, fitting, needs.count_own_arguments(batch), left).items():
        lines[line] = lines.get(line, 0) + size
    if keeps_graphs:
        lines["activations"] = lines.get("activations", 0) + fitting * graphs
    return SweepPlan(
        is_resident=is_resident,
        reads_ahead=reads_ahead,
        batch_samples=batch,
        passes=passes,
        keeps_graphs=keeps_graphs,
        kept_limit=left,
        peak_bytes=sum(lines.values()) + _SLACK,
        bytes_read=needs.stored_bytes * (1 if is_resident else sweeps) + ends + again + written,
        bytes_written=written,
        reads_once=needs.uses_layers_once,
        host_limit=host_limit,
        spilled_bytes=spilled,
        lines=lines,
    )


def check_least(layer: int, vocabulary: int, dtype: str, memory: int, resident: int) -> None:
    """Before anything is allocated: raise `CapacityError` where a layer, or the embeddings, of so many elements do not fit.

    `memory`: bytes allowed. `resident`: of them, what the process has already.
    """
    size, largest = (elements * item_bytes(dtype) for elements in (layer, vocabulary))
    needed = resident + max(size, largest)
    if needed > memory:
        raise lack_of_memory(
            f"the embeddings ({format_size(largest)}) or one layer ({format_size(size)}) in {dtype} need {format_size(needed)} "
            f"with the program itself, over the {format_size(memory)} allowed",
            needed + LOGIT_BYTES * LOGITS_AT_ONCE + _OPENING,
            dtype=dtype,
        )


def _choose_batch(needs: SweepNeeds, free: int, *, is_resident: bool) -> int:
    """As many samples as make a batch of the usual size, and take no more than a third of what is free beside one."""
    room = (free - sum(_count_phases(needs, 1, is_resident=is_resident).values()) - _SLACK) // 3
    most = max(1, min(needs.samples, BATCH_TOKENS // needs.tokens, 1 + room // max(needs.count_work(1), 1)))
    while most > 1 and sum(_count_phases(needs, most, is_resident=is_resident).values()) + _SLACK > free:
        most -= 1
    return most


def _count_phases(needs: SweepNeeds, batch: int, *, is_resident: bool) -> dict[Line, int]:
    """Bytes by line at the moment that takes most: while tokens are embedded, a layer is loaded or works, or the head works.

    Embeddings, layers and head are in memory one at a time, unless all of them stay.
    """
    # Of arguments that batches share there are two: the last batch is smaller.
    arguments = 0 if needs.has_padding else 2 * (needs.fixed_argument_bytes + batch * needs.argument_bytes)
    staying: dict[Line, int] = {"embeddings and head": needs.vocabulary_bytes, "layer weights": needs.all_layer_bytes}
    boundary = batch * needs.boundary_bytes
    embedding: dict[Line, int] = {"embeddings and head": needs.embedding_bytes, "activations": 2 * boundary}
    loading: dict[Line, int] = {"layer weights": needs.layer_bytes, "read ahead": needs.largest_tensor_bytes}
    layer: dict[Line, int] = {
        "layer weights": needs.layer_bytes,
        "activations": needs.count_work(batch),
        "weight gradients": needs.weight_gradient_bytes,
    }
    phases = [embedding, loading, layer]
    if needs.has_head:
        head: dict[Line, int] = {"embeddings and head": needs.head_bytes, "logits": needs.count_logit_bytes(batch)}
        phases.append({**head, "activations": 3 * boundary})
    if is_resident:
        phases = [{**phase, **staying} for phase in phases]
    most = max(phases, key=lambda lines: sum(lines.values()))
    return {line: size for line, size in {**most, "layer arguments": arguments}.items() if size}


def _split_kept(needs: SweepNeeds, samples: int, arguments: int, limit: int) -> dict[Line, int]:
    """What is held between layers of so many samples, by line: arguments and gradients first, they are used most often."""
    wanted: dict[Line, int] = {}
    if needs.has_padding:
        wanted["layer arguments"] = samples * arguments
    if needs.is_backward:
        wanted["gradients"] = samples * needs.boundary_bytes
    wanted["hidden states"] = samples * needs.kept_bytes - wanted.get("gradients", 0)
    lines: dict[Line, int] = {}
    for line, size in wanted.items():
        lines[line] = min(size, limit)
        limit -= lines[line]
    return lines


def format_size(size: int) -> str:
    """A size for people: `0.39 GiB`, `12 MiB`, `80 KiB`."""
    if size >= 2**28:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
