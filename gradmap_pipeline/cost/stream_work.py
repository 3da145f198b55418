"""Estimate a run of the original model and of a pruned one over the same samples, and the work that is done with both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..correction.streams import plan_streams
from ..machine.memory_advice import lack_of_memory
from ..sweep.memory_plan import format_size
from ..sweep.needs import BOUNDARIES_GOING_UP
from .estimate import Estimate

if TYPE_CHECKING:
    from .model_costs import ModelCosts


@dataclass(frozen=True)
class StreamWork:
    """The work of a stage with two models that see the same samples."""

    reserve: int = 0
    """Bytes to leave free for it."""
    again: int = 0
    """Layers of the pruned model that are run once more."""
    goes_up: bool = False
    """Both models go up side by side, as in `open_streams`; else all hidden states are kept."""
    purpose: str = "sums of a correction"
    """The reserve is for this; a plan shows it under this name."""
    beside: int = 0
    """Bytes of what is kept besides hidden states of these samples."""
    taken: int = 0
    """Bytes of what is kept only where it finds room beside the hidden states of the pruned model that goes up."""
    has_head: bool = False
    """The head works, too, and has its room."""
    loads: tuple[int, int] | None = None
    """So many layers are read again where all of them stay in memory, and so many where not; None stands for none and `again`."""
    load_bytes: int = 0
    """Bytes of other files that are read with each of these."""


def estimate_two_streams(costs: ModelCosts, layers: int, samples: int, tokens: int, work: StreamWork) -> Estimate:
    """Estimate the original model and one of so many layers. Raises `CapacityError` where they do not fit into memory."""
    whole = len(costs.graph.layers)
    free = costs.memory - costs.occupied
    needs = costs.needs(whole, samples, tokens)
    plan, room = plan_streams(
        needs, free, work.reserve, costs.host_free, has_head=work.has_head, held=costs.occupied, goes_up=work.goes_up
    )
    held = free - plan.kept_limit
    if held + work.reserve > free:
        raise lack_of_memory(
            f"one layer and what is computed with it ({format_size(work.reserve)}) need {format_size(held + work.reserve)}, and of "
            f"the memory allowed {format_size(free)} are left",
            costs.memory + held + work.reserve - free,
        )
    boundaries = whole + layers + 2
    at_once = BOUNDARIES_GOING_UP if work.goes_up else boundaries
    kept = samples * needs.boundary_bytes * at_once + work.beside
    spilled = max(0, kept - room)
    written = spilled * boundaries // at_once
    taken = work.taken if kept // 2 + work.taken <= room // 2 else 0
    lines: dict[str, int] = {
        **{str(line): size for line, size in plan.lines.items()},
        "hidden states": min(room, kept) + taken,
        work.purpose: work.reserve,
    }
    allocator = plan.peak_bytes - sum(plan.lines.values())
    staying, passing = work.loads or (0, work.again)
    more = staying if plan.is_resident else passing
    layer_bytes = costs.stored_layer_bytes / whole
    read = round(layer_bytes * (whole + layers + more)) + work.load_bytes * more + 2 * costs.embedding_bytes
    layer = costs.benchmark.layer_pass(plan.batch_samples, tokens)
    count = samples * (whole + layers + work.again)
    return costs.opening() * 2 + Estimate(
        peak_bytes=costs.occupied + sum(lines.values()) + allocator,
        lines={"program": costs.occupied, **lines, "allocator": allocator},
        bytes_read=read + written,
        bytes_written=written,
        flops=count * layer.flops,
        seconds=count * layer.forward + costs.moving(read, written),
        how=replace(plan, bytes_written=written).describe(),
        disk_bytes=spilled,
    )
