"""The same tokens inside the original and a pruned model, side by side.

Sizes: B sequences a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..context import count_nothing
from ..machine.distributed import ProcessGroup
from ..sweep.kept_tensors import KeptTensors
from ..sweep.layerwise import LayerwiseModel
from ..sweep.memory_plan import SweepPlan, plan_sweep
from ..sweep.needs import SweepNeeds
from ..sweep.sample_pass import SamplePass
from ..sweep.sweep import Stream, open_sweep
from ..sweep.visits import ForwardVisit
from ..work import Round
from .behind_norms import apply_unscaled
from .site_search import check_gain
from .sites import CapturedError, NoSiteError, NotFiniteError

if TYPE_CHECKING:
    import torch

    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from ..data.calibration_set import CalibrationSet
    from .sites import Site
    from .writers import Writer

Captured = TypeVar("Captured")


@dataclass
class Drift:
    """Sums over tokens, fp64, from which the mean shift at one boundary follows."""

    difference: torch.Tensor | float = 0.0
    """Σ (h' - h), (D,)"""
    norm: float = 0.0
    """Σ ‖h‖"""
    tokens: int = 0

    def add(self, drifted: torch.Tensor, target: torch.Tensor) -> None:
        """Both (n, D), fp64."""
        self.difference = self.difference + (drifted - target).sum(0)
        self.norm += float(target.norm(dim=-1).sum())
        self.tokens += len(target)

    def join(self, group: ProcessGroup) -> None:
        """Sum over the processes of a group."""
        group.sum(self.difference)  # type: ignore[arg-type]
        sums = group.sum_values({"norm": self.norm, "tokens": self.tokens})
        self.norm, self.tokens = sums["norm"], int(sums["tokens"])

    @property
    def mean(self) -> torch.Tensor:
        """E[h' - h], (D,)"""
        return self.difference / self.tokens  # type: ignore[return-value]

    @property
    def shift(self) -> float:
        """‖E[h'] - E[h]‖"""
        return float(self.mean.norm())

    @property
    def relative_shift(self) -> float:
        """Over E‖h‖."""
        return self.shift / max(self.norm / self.tokens, 1e-300)


def plan_streams(
    needs: SweepNeeds,
    free: int,
    reserve: int,
    host_free: int = 0,
    *,
    has_head: bool = False,
    held: int = 0,
    goes_up: bool = False,
) -> tuple[SweepPlan, int]:
    """Plan how the original and the pruned model run over samples; return the plan, and how much of what they keep stays in memory.

    `reserve`: bytes to leave free for what is done with that. `host_free`: bytes in the machine's memory beside that of a GPU.
    `has_head`: whether logits are computed. `held`: bytes that the process has besides, for messages. `goes_up`: as in
    `open_streams`.
    """
    alone = replace(needs, is_backward=False, has_head=has_head)
    alone = alone.going_up() if goes_up else alone
    plan = plan_sweep(alone, free, divisible=False, reserve=reserve, host_free=host_free, held=held)
    return plan, max(0, plan.kept_limit - reserve) + plan.host_limit


def open_streams(
    graph: ModelGraph,
    calibration: CalibrationSet,
    context: Context,
    reserve: int,
    batch_samples: int | None = None,
    *,
    goes_up: bool = False,
) -> Streams:
    """Run the original model, keep what enters its kept layers, and open the pruned one; one model is in memory at a time.

    `reserve`: bytes to leave free for what is done with them. `batch_samples`: samples of a batch, where not as many as memory
    and speed say. `goes_up`: run neither. `Streams.go_up_to` then runs both, one layer of one of them at a time, and keeps hidden
    states of the layer that it has come to alone.
    """
    depths = (1, 1) if goes_up else (graph.base.layers, len(graph.layers))
    whole, pruned = (Stream(reserve, share=depth / sum(depths), batch_samples=batch_samples, goes_up=goes_up) for depth in depths)
    original = open_sweep(graph.dense, calibration.load(), context, keep="all", divisible=False, stream=whole)
    if goes_up:
        original.model.weights.reads_ahead = False  # its next layer would lie beside that of the pruned model
        after = open_sweep(graph, calibration.load(), context, keep="all", stream=pruned, plan=original.plan)
        dense, left = original.open_only_pass(), after.open_only_pass()
        for one in (dense, left):
            one.keep_only((0,))
        return Streams(original.kept, left, graph, context.group, original=dense)
    units = graph.base.layers * len(original.batches)
    with context.progress("run the original model", units, "layer batch") as original.advance:
        for step in original.forward():
            for _ in step:
                pass
            if step.layer not in graph.layers or step.layer < graph.removed[0]:
                original.kept.drop(step.layer)  # nothing is compared there
        del step
        targets = original.detach()
        after = open_sweep(graph, calibration.load(), context, keep="all", stream=pruned, plan=original.plan)
    return Streams(targets, after.open_only_pass(), graph, context.group, graph.base.layers)


@dataclass
class Streams:
    """Tokens inside the original and the pruned model: what enters layers of the first, and a pass through the second."""

    targets: KeptTensors
    """These tensors enter layers of the original model: those layers that the pruned model has, above the first that it has lost.

    Where the original goes up beside the pruned model, they are those at the layer that both have come to."""
    pruned: SamplePass
    graph: ModelGraph
    group: ProcessGroup
    original_forwards: int = 0
    """Layer forwards of the original model, once it has come to the top."""
    scales: dict[int, float] = field(default_factory=dict)
    """By base layer, what the pruned stream that enters it is times too small by design; 1 where it is not there."""
    writers: Mapping[int, Sequence[Writer]] = field(default_factory=dict)
    """What writes to the residual stream, by base layer; empty until it is looked for."""
    measured: dict[int, Drift] = field(default_factory=dict)
    """The drift of every layer, as it was first measured; empty until then."""
    original: SamplePass | None = None
    """A pass through the original model, where it goes up beside the pruned one; else it has come to the top."""
    passed: int = 0
    """Kept layers, from the bottom, that `go_up_to` has come to."""

    def work(self, seconds: float) -> Round:
        """What both models have computed so far."""
        original = self.original_forwards if self.original is None else self.original.layer_forwards
        return Round(layer_forwards=original + self.pruned.layer_forwards, layer_backwards=0, seconds=seconds)

    def go_up_to(self, layer: int, context: Context) -> int:
        """Go up, in both models, to what enters a kept layer, and in the original to what should leave it.

        What enters and leaves that layer is all that is kept then. Returns how many kept layers were passed on the way. Nothing
        happens where the original model has come to the top.
        """
        if self.original is None:
            return 0
        bounds = [*self.graph.layers, self.graph.base.layers]
        goal = self.graph.layers.index(layer)
        units = len(self.pruned.batches) * (bounds[goal + 1] - self.original.done + goal - self.pruned.done)
        shown = context.progress("run both models", units, "layer batch") if goal > self.passed else nullcontext(count_nothing)
        with shown as advance:
            self.original.advance = self.pruned.advance = advance
            for position in range(min(self.passed, goal), goal + 1):
                self.original.keep_only(bounds[position : position + 2])
                self.original.run_up_to(bounds[position + 1] - 1, through=True)
                self.pruned.keep_only((position, position + 1))
                self.pruned.run_up_to(bounds[position])
        self.original.advance = self.pruned.advance = count_nothing
        passed, self.passed = goal - self.passed, goal + 1
        return max(0, passed)

    def target(self, position: int, batch: int) -> torch.Tensor:
        """What should leave the kept layer at `position`: what enters the next kept layer in the original model."""
        kept = self.graph.layers
        return self._original(kept[position + 1] if position + 1 < len(kept) else self.graph.base.layers, batch)

    def target_before(self, layer: int, visit: ForwardVisit) -> torch.Tensor:
        """What should enter a kept layer, for a batch: (tokens not padded, D), fp64."""
        entering = visit.input if layer < self.graph.removed[0] else self._original(layer, visit.batch)
        return entering[visit.mask].double()

    def list_scales(self) -> dict[int, float]:
        """The scales right above cuts; none where nothing is rescaled."""
        return {layer: scale for layer, scale in self.scales.items() if layer - 1 in self.graph.removed}

    def take_scales(self, scales: Mapping[int, float]) -> None:
        """Take the pruned stream for one that is rescaled already, by what `list_scales` gave."""
        for cut, scale in sorted(scales.items()):
            self.scales |= {layer: scale for layer in (*self.graph.layers, self.graph.base.layers) if layer >= cut}

    def scale_above(self, layer: int) -> float:
        """What the stream that leaves a kept layer is times too small by design."""
        above = [other for other in self.graph.layers if other > layer]
        return self.scales.get(above[0] if above else self.graph.base.layers, 1.0)

    def entering(self, layer: int, batch: int) -> torch.Tensor:
        """Return the hidden states (B, T, D) that enter a base layer of the original model.

        Raises `PluginError` where both models go up side by side, and are at another layer.
        """
        return self.targets.get(layer, batch) if self.original is None else self.original.boundary(layer, batch)

    def _original(self, layer: int, batch: int) -> torch.Tensor:
        """Return the same in the size that the pruned stream has there."""
        scale = self.scales.get(layer, 1.0)
        hidden = self.entering(layer, batch)
        return hidden if scale == 1 else hidden / scale

    def check_gain(self, layer: int, site: Site) -> None:
        """`check_gain` of a site of a base layer in the pruned model, whose weights must be in. What one refuses, all do."""
        with self.group.agreeing(NoSiteError, NotFiniteError):
            check_gain(self.pruned.model, layer, *self.pruned.probe(layer), site)

    def join(self, drift: Drift, layer: int) -> None:
        """Sum a layer's drift over the processes. Raises `NotFiniteError` where it is not finite."""
        drift.join(self.group)
        if not math.isfinite(drift.norm) or not drift.difference.isfinite().all():  # type: ignore[union-attr]
            raise NotFiniteError(f"the drift of layer {layer}")

    def measure_drift(self) -> dict[int, Drift]:
        """Drift at the output of every kept layer from the first removal up."""
        self.pruned.run_forward()
        drifts = {}
        for position, layer in enumerate(self.graph.layers):
            if layer + 1 >= self.graph.removed[0]:
                drifts[layer] = Drift()
                for index, batch in enumerate(self.pruned.batches):
                    drifted, target = self.pruned.boundary(position + 1, index), self.target(position, index)
                    mask = batch.mask.to(target.device)
                    drifts[layer].add(drifted[mask].double(), target[mask].double())
                self.join(drifts[layer], layer)
        self.measured = self.measured or drifts
        return drifts


def run_to_site(
    pruned: SamplePass, layer: int, capture: AbstractContextManager[list[Captured]]
) -> Iterator[tuple[ForwardVisit, Captured]]:
    """Run a layer as far as one of its sites, batch by batch: the batch, and what is captured there before the layer is left.

    A visit's `output` is what enters the layer: what leaves it is not computed.
    """
    import torch

    pruned.run_up_to(layer)
    position, model = pruned.layers.index(layer), pruned.model
    with model.layer(layer), capture as captured:
        for index, batch in enumerate(pruned.batches):
            hidden = pruned.boundary(position, index)
            with torch.no_grad(), suppress(CapturedError):
                model.run_layer(layer, hidden, pruned.arguments(index, layer))
            yield ForwardVisit(hidden, hidden, batch.mask.to(hidden.device), index), captured.pop()
            pruned.advance()
    pruned.layer_forwards += 1


@contextmanager
def capture_site(
    model: LayerwiseModel, layer: int, site: Site, side: Literal["input", "output"], *, leave: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Collect, each time its layer runs, what a correction of a site multiplies, times the site's gain.

    That is what enters a linear map, or what leaves it; of a norm, what its scale multiplies. `leave`: go no further in the layer,
    but raise an error that `run_to_site` expects.
    """
    captured: list[torch.Tensor] = []
    module = model.module.get_submodule(f"{model.layers_path}.{layer}.{site.name}")

    def listen(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        taken = inputs[0] if side == "input" else output
        values = apply_unscaled(module, *inputs) if site.role == "norm" else taken
        captured.append(values if site.gain == 1 else values * site.gain)
        if leave:
            raise CapturedError

    handle = module.register_forward_hook(listen)
    try:
        yield captured
    finally:
        handle.remove()
