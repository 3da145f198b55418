"""The door to the engine: samples through a model one layer at a time, within the memory that a step may have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from ..batches import Batch, count_predicted, make_batches
from ..machine.memory import give_back, resident_bytes
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


def open_sweep(
    graph: ModelGraph,
    samples: Samples,
    context: Context,
    *,
    need: Need = "forward",
    keep: Literal["none", "all"] = "none",
    divisible: bool = True,
    dtype: str | None = None,
) -> Sweep:
    """Sweep over this process's share of samples, to be used in a `with` block.

    `keep`: `all` keeps the hidden states at every boundary between layers, so that going down, or up again after `remove`, starts
    from there; `none` keeps those at the layer that is at work. `divisible` False: what is computed is no sum over samples, so
    all of them must be seen at a layer before the next. `dtype`: to compute in, where it is not the step's.
    Raises `CapacityError` where one layer and one sample do not fit into the memory of the step.
    """
    return Sweep(graph, samples, context, need=need, keep=keep, divisible=divisible, dtype=dtype)


class Sweep:
    """Samples that go through a model, up and down, in as many passes as memory requires.

    A layer comes once for each pass, with other samples each time: sum over all that comes.
    """

    def __init__(
        self,
        graph: ModelGraph,
        samples: Samples,
        context: Context,
        *,
        need: Need = "forward",
        keep: Literal["none", "all"] = "none",
        divisible: bool = True,
        dtype: str | None = None,
        reserve: int = 0,
        sharers: int = 1,
        has_head: bool = True,
        plan: SweepPlan | None = None,
    ) -> None:
        """`reserve`: bytes to leave free for what is done with the hidden states. `sharers`: sweeps that keep hidden states at a
        time, in equal parts of the rest. `has_head` False: layers alone are run, and no loss is computed. `plan`: of a sweep that
        shares the memory, made before it took any."""
        backward = need != "forward"
        ids, mask = (context.group.share(part) for part in samples)
        count, tokens = ids.shape
        self.model = LayerwiseModel(graph, device=context.device, dtype=dtype or context.dtype, resident_bytes=0)
        self._keeps = backward or keep == "all"
        if plan is None:
            needs = measure_needs(
                self.model,
                count,
                tokens,
                backward=backward,
                weight_gradients=need == "weight gradients",
                keep_boundaries=self._keeps,
                padded=not bool(mask.bool().all()),
                has_head=has_head,
            )
            free = context.memory - resident_bytes(context.device)
            plan = plan_sweep(needs, free, divisible=divisible, reserve=reserve)
        self.plan = plan
        self.model.weights.resident, self.model.weights.prefetch = self.plan.resident, self.plan.prefetch
        self._need = need
        self.kept = KeptTensors(max(0, self.plan.kept_limit - reserve) // sharers, context.folder, ledger=self.model.weights.ledger)
        size = math.ceil(count / self.plan.passes)
        batch_tokens = self.plan.batch_samples * tokens
        self._parts = [
            make_batches(part, part_mask, batch_tokens, lengths_apart=self.model.lengths_apart)
            for part, part_mask in zip(ids.split(size), mask.split(size), strict=True)
        ]
        self._predicted = int(context.group.sum_values({0: count_predicted(self.batches)})[0])
        self._has_head = has_head
        self._removed: list[int] = []
        self._only: SamplePass | None = None
        self.advance: Advance = lambda units=1, /: None
        """Called after each batch of each layer, and of the head."""
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
        """Those of all passes."""
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
            if len(self._parts) == 1 and self._keeps:
                self._only = one

    def open_only_pass(self) -> SamplePass:
        """All samples, where they go through together."""
        (batches,) = self._parts
        self._only = self._only or self._open(batches)
        return self._only

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
            keep_boundaries=self._keeps,
            keep_graphs=self.plan.keep_graphs,
            weight_gradients=self._need == "weight gradients",
            predicted=self._predicted,
            advance=lambda units=1, /: self.advance(units),
        )
        if not self._has_head:
            self.model.weights.forget_rest()
        for layer in self._removed:
            one.remove(layer)
        return one
