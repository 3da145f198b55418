"""The door to the engine: samples through a model one layer at a time, within the memory that a step may have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..batches import Batch, count_predicted, make_batches
from ..context import count_nothing
from ..errors import CapacityError
from ..machine.distributed import ProcessGroup
from ..machine.memory import free_on_host, give_back, keep_blocks, resident_bytes
from .kept_tensors import KeptTensors
from .layerwise import LayerwiseModel
from .ledger import Ledger
from .memory_plan import SweepPlan, plan_sweep
from .needs import measure_needs
from .sample_pass import SamplePass

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from ..checkpoint.graph import ModelGraph
    from ..context import Advance, Context
    from .visits import BackwardLayer, ForwardLayer

Need = Literal["forward", "backward", "weight gradients"]
"""What a sweep computes: hidden states; gradients of the loss with respect to them, too; those of the weights, too."""
Samples = tuple["torch.Tensor", "torch.Tensor"]
"""Token ids int64 (samples, T), and the attention mask, 0 where padded, of the same shape: what `CalibrationSet.load` gives."""

_GAPS = 8
"""One part in so many of what a sweep takes may be lost between blocks that the allocator keeps."""


@dataclass(frozen=True)
class Stream:
    """How much memory a sweep may use for what it keeps, beside other sweeps that keep something at the same time."""

    reserve: int
    """Bytes to leave free for what is done with the hidden states."""
    share: float
    """Of the rest, the part that is for what this sweep keeps."""
    has_head: bool = False
    """Whether logits are computed; else layers alone are run."""
    batch_samples: int | None = None
    """Samples of a batch; None: as many as the plan chooses. More than that have their room in `reserve`."""
    goes_up: bool = False
    """Whether this sweep goes up beside that of another model, as `SweepNeeds.going_up` says."""


def open_sweep(
    graph: ModelGraph,
    samples: Samples,
    context: Context,
    *,
    need: Need = "forward",
    keep: Literal["none", "all"] = "none",
    divisible: bool = True,
    dtype: str | None = None,
    stream: Stream | None = None,
    plan: SweepPlan | None = None,
) -> Sweep:
    """Sweep over this process's share of samples, to be used in a `with` block.

    `keep`: `all` keeps the hidden states at every boundary between layers, so that going down, or up again after `remove`, starts
    from there; `none` keeps those at the layer that is at work. `divisible` False: what is computed is not a sum over samples, so
    all of them must be seen at a layer before the next. `dtype`: to compute in, where it is not the step's. `stream`: for a sweep
    that shares memory with others. `plan`: to be followed; None makes one for the memory that is free.
    Raises `CapacityError` where one layer and one sample do not fit into the memory of the step.
    """
    group = context.group
    ids, mask = (group.share(part) for part in samples)
    count, tokens = math.ceil(len(samples[0]) / group.size), ids.shape[1]  # the largest share, so that all plan alike
    is_backward, has_weight_gradients = need != "forward", need == "weight gradients"
    keeps_boundaries = is_backward or keep == "all"
    reserve = stream.reserve if stream else 0
    has_head = stream is None or stream.has_head
    model = LayerwiseModel(graph, device=context.device, dtype=dtype or context.dtype, resident_bytes=0)
    if plan is None:
        needs = measure_needs(
            model,
            count,
            tokens,
            is_backward=is_backward,
            has_weight_gradients=has_weight_gradients,
            keeps_boundaries=keeps_boundaries,
            has_padding=not bool(samples[1].bool().all()),
            has_head=has_head,
        )
        needs = needs.going_up() if stream and stream.goes_up else needs
        held = resident_bytes(context.device)
        free = group.least(context.memory - held)
        host_free = group.least(free_on_host(context.device, context.host_memory))
        with group.agreeing(CapacityError):
            plan = plan_sweep(needs, free, divisible=divisible, reserve=reserve, host_free=host_free, held=held)
        keep_blocks(keep=plan.peak_bytes + plan.peak_bytes // _GAPS + reserve <= free)
    if stream and stream.batch_samples:
        plan = replace(plan, batch_samples=stream.batch_samples)
    model.weights.overrides.use_folder(context.folder)
    model.weights.is_resident, model.weights.reads_ahead = plan.is_resident, plan.reads_ahead
    share = stream.share if stream else 1
    kept_limit = int(max(0, plan.kept_limit - reserve) * share)
    passes = min(plan.passes, len(samples[0]) // group.size)
    parts = [
        make_batches(part, part_mask, plan.batch_samples * tokens, lengths_apart=model.lengths_apart)
        for part, part_mask in zip(ids.tensor_split(passes), mask.tensor_split(passes), strict=True)
    ]
    predicted = sum(count_predicted(part) for part in parts)
    return Sweep(
        model,
        parts,
        plan,
        KeptTensors(kept_limit, context.folder, host_bytes=int(plan.host_limit * share), ledger=model.weights.ledger),
        keeps_boundaries=keeps_boundaries,
        has_weight_gradients=has_weight_gradients,
        has_head=has_head,
        predicted=int(group.sum_values({0: predicted})[0]),
    )


class Sweep:
    """Samples that go through a model, up and down, in as many passes as memory requires; `open_sweep` makes it.

    A layer comes once for each pass, with other samples each time: sum over all that comes.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        parts: list[list[Batch]],
        plan: SweepPlan,
        kept: KeptTensors,
        *,
        keeps_boundaries: bool,
        has_weight_gradients: bool,
        has_head: bool,
        predicted: int,
    ) -> None:
        """`parts`: the batches of each pass. `predicted`: tokens of all processes that the mean loss is over."""
        self.model = model
        self.plan = plan
        self.kept = kept
        self._parts = parts
        self._keeps_boundaries = keeps_boundaries
        self._has_weight_gradients = has_weight_gradients
        self._has_head = has_head
        self._predicted = predicted
        self._removed: list[int] = []
        self._only: SamplePass | None = None
        self.advance: Advance = count_nothing
        """Called after each batch of each layer, and of the head."""
        self.scorers = ProcessGroup()
        """The processes that have the same samples and share the layers to score."""
        self.layer_forwards = 0
        """Passes of all samples through one layer, recomputation included."""
        self.layer_backwards = 0

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give back the memory of weights and hidden states."""
        self._only = None
        self.kept.clear()
        del self.model
        give_back()

    def detach(self) -> KeptTensors:
        """Give back the memory of weights, and go on with what is kept between layers."""
        self._only = None
        del self.model
        give_back()
        return self.kept

    @property
    def ledger(self) -> Ledger:
        """What is held in memory, and was at most."""
        return self.model.weights.ledger

    @property
    def batches(self) -> list[Batch]:
        """The batches of all passes."""
        return [batch for part in self._parts for batch in part]

    def passes(self) -> Iterator[SamplePass]:
        """The samples of each pass; what it forgets when it ends is only what another pass needs the memory for."""
        for number, batches in enumerate(self._parts):
            one = self._only or self._open(batches)
            before = one.layer_forwards, one.layer_backwards
            yield one
            if number == 0:
                self.layer_forwards += one.layer_forwards - before[0]
                self.layer_backwards += one.layer_backwards - before[1]
            if len(self._parts) == 1 and self._keeps_boundaries:
                self._only = one

    def open_only_pass(self) -> SamplePass:
        """All samples, where they go through together."""
        (batches,) = self._parts
        self._only = self._only or self._open(batches)
        return self._only

    def open_beside(self, samples: Samples, times: float) -> SamplePass:
        """Other samples in the same model, whose hidden states have so many times as much memory."""
        ids, mask = samples
        tokens = self.plan.batch_samples * ids.shape[1]
        batches = make_batches(ids, mask, tokens, lengths_apart=self.model.lengths_apart)
        return SamplePass(self.model, batches, kept=self.kept.open_beside(times))

    def forward(self) -> Iterator[ForwardLayer]:
        """Go up from the first layer whose output is not known, once for each pass: through all layers, unless `keep` is `all`."""
        for one in self.passes():
            yield from one.forward()

    def backward(self) -> Iterator[BackwardLayer]:
        """Go down from the mean loss over all samples, once for each pass."""
        for one in self.passes():
            yield from one.backward()

    def losses(self) -> Iterator[torch.Tensor]:
        """Cross-entropy of each token (B, T-1) of each of `batches`, 0 where padded."""
        for one in self.passes():
            yield from one.losses()

    def logits(self, last: int | None = None) -> Iterator[torch.Tensor]:
        """Logits (B, T, V) of each of `batches`; of the `last` positions alone, where that is given."""
        for one in self.passes():
            yield from one.logits(last)

    def remove(self, layer: int) -> None:
        """Take a base layer out of the model."""
        self._removed.append(layer)
        if self._only is not None:
            self._only.remove(layer)

    def _open(self, batches: list[Batch]) -> SamplePass:
        self.kept.clear()
        one = SamplePass(
            self.model,
            batches,
            kept=self.kept,
            keep_boundaries=self._keeps_boundaries,
            keep_graphs=self.plan.keeps_graphs,
            weight_gradients=self._has_weight_gradients,
            predicted=self._predicted,
            advance=lambda units=1, /, *, detail="": self.advance(units, detail=detail),
        )
        one.scorers = self.scorers
        if not self._has_head:
            self.model.weights.forget_rest()
        for layer in self._removed:
            one.remove(layer)
        return one
