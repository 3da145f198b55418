"""How layers get scores from sweeps over a calibration set: what a stage says of it, and the sweeps themselves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..checkpoint.graph import ModelGraph
from ..context import Context
from ..data.calibration_set import CalibrationSet
from ..errors import CapacityError, PluginError, StageError
from ..machine.accelerators import wait_for
from ..machine.distributed import ProcessGroup
from ..machine.memory import resident_bytes
from ..work import Round

if TYPE_CHECKING:
    from ..sweep.sample_pass import SamplePass
    from ..sweep.sweep import Need, Sweep

Scores = dict[int, float]
"""Importance by base layer. Higher means keep."""


@dataclass(frozen=True)
class Measure:
    """How a stage gets its scores from sweeps over the calibration set."""

    of: Callable[[SamplePass], Scores]
    """What one pass of samples gives for the layers it has: this process's share of a sum over samples."""
    key: Any
    """All that the scores depend on besides the model, the calibration set and the layers that are left."""
    need: Need = "forward"
    keep: Literal["none", "all"] = "none"
    """Whether a forward pass keeps hidden states at all boundaries between layers, for `boundary` and `loss_without`."""
    sample_share: float = 1.0
    """Share of the calibration samples that are swept, the first of them."""
    may_share_layers: bool = False
    """Whether `of` scores the layers of `SamplePass.own` alone, each by a way through the layers above it. Several processes then
    share layers instead of samples, where that reads and writes less."""


def check_scores(stage: str, scores: Any, layers: Sequence[int]) -> Scores:
    """Scores as plain numbers. Raises `PluginError` unless they are numbers by layer of the model, at least one."""
    if not isinstance(scores, Mapping) or not scores:
        raise PluginError(f"stage {stage!r}: a ranking must be scores by layer, at least one; got {shorten(scores)}")
    for layer, score in scores.items():
        if isinstance(layer, bool) or layer not in layers:
            raise PluginError(f"stage {stage!r} scores layer {layer!r}, which the model does not have; it has {list(layers)}")
        if isinstance(score, bool) or not isinstance(score, Real):
            raise PluginError(f"stage {stage!r}: the score of layer {layer} must be a number, got {shorten(score)}")
    return {int(layer): float(score) for layer, score in scores.items()}


def shorten(value: Any) -> str:
    """What a value looks like, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Scoring(Protocol):
    """What makes one ranking after another of the layers that are left."""

    def score(self, kept: set[int], before: Scores, /) -> dict[str, Any]:
        """`scores` by layer, and `work`, a `Round`, as JSON. `before`: the scores of the ranking before; none at first.

        They depend on nothing else, so that a run that goes on makes the same decisions.
        """

    def close(self) -> None:
        """Give back memory."""


class Scorer:
    """Scores the layers that are left, one ranking after another; the next starts from what the last leaves valid."""

    def __init__(self, stage: str, measure: Measure, model: ModelGraph, calibration: CalibrationSet, context: Context) -> None:
        self.stage, self.measure, self.model, self.calibration, self.context = stage, measure, model, calibration, context
        self._sweep: Sweep | None = None
        self._left: set[int] = set()
        self._shares_layers = False

    @property
    def used_samples(self) -> int:
        """How many of the calibration samples are swept."""
        return math.ceil(self.measure.sample_share * self.calibration.samples)

    def score(self, kept: set[int], _before: Scores, /) -> dict[str, Any]:
        """Importance by layer, and the work it took, as JSON."""
        started = time.perf_counter()
        sweep = self._open_sweep(kept)
        before = sweep.layer_forwards, sweep.layer_backwards
        scores: Scores = {}
        reused, forward_seconds = 0, 0.0
        for samples in sweep.passes():
            reused = samples.done
            since = time.perf_counter()
            if self.measure.need != "forward":
                samples.run_forward()
                wait_for(self.context.device)
            forward_seconds += time.perf_counter() - since
            made = self.measure.of(samples)
            if self._shares_layers and made == {}:
                continue  # more processes than layers to score
            for layer, score in check_scores(self.stage, made, sorted(kept)).items():
                scores[layer] = scores.get(layer, 0.0) + score
        scores = self._join(scores, kept)
        broken = [layer for layer, score in sorted(scores.items()) if not math.isfinite(score)]
        if broken:
            self._refuse(broken[0], kept)
        forwards: float = sweep.layer_forwards - before[0]
        if self._shares_layers:
            forwards = self.context.group.sum_values({0: forwards})[0]
        seconds = time.perf_counter() - started
        share = self.used_samples / self.calibration.samples
        saved = forward_seconds / max(1, len(kept) - reused) * reused
        work = Round(
            layer_forwards=forwards * share,
            layer_backwards=(sweep.layer_backwards - before[1]) * share,
            seconds=seconds,
            reused_layers=reused,
            saved=saved / (seconds + saved),
        )
        return {"scores": scores, "work": work.model_dump()}

    def _join(self, scores: Scores, kept: set[int]) -> Scores:
        """Scores of all processes: sums over samples, or of other layers in each."""
        group = self.context.group
        if not self._shares_layers:
            return group.sum_values(scores)
        counts = group.sum_values({layer: float(layer in scores) for layer in kept})
        sums = group.sum_values({layer: scores.get(layer, 0.0) for layer in kept})
        return {layer: sums[layer] for layer in sorted(kept) if counts[layer]}

    def _refuse(self, layer: int, kept: set[int]) -> None:
        """Raise the error that tells why the score of a layer is not finite."""
        from ..sweep.finite import explain_nonfinite

        assert self._sweep is not None
        batches, context = self._sweep.batches, self.context
        self.close()
        left = self.model.without_layers(set(self.model.layers) - kept) if kept < set(self.model.layers) else self.model
        name = f"the score of layer {layer}"
        error = explain_nonfinite(name, [left], batches, context.device, context.dtype, context.folder)
        wider = "; use --dtype float32 or bfloat16" if context.dtype == "float16" else ""
        vague = StageError(f"{name} is not a finite number in {context.dtype}, though all logits are{wider}")
        context.group.agree(error or vague, is_vague=error is None)

    def close(self) -> None:
        """Give back the memory of the sweep."""
        if self._sweep is not None:
            self._sweep.close()
            self._sweep = None

    def _open_sweep(self, kept: set[int]) -> Sweep:
        """The sweep over the layers that are left: the one before with fewer layers, where it keeps what lies below them."""
        if self._sweep is None:
            self._sweep = self._open_cheapest(kept)
            self._left = set(kept)
        for layer in self._left - kept:
            self._sweep.remove(layer)
        self._left = set(kept)
        return self._sweep

    def _open_cheapest(self, kept: set[int]) -> Sweep:
        """A sweep over this process's share of the samples, or over all of them where processes had better share layers."""
        group, self._shares_layers = self.context.group, False
        sweep = self._open(kept, self.context)
        if not self.measure.may_share_layers or group.size == 1 or sweep.plan.is_resident:
            return sweep
        ways = 1 + len(kept) / 2, 1 + len(kept) / 2 / group.size  # through all layers; from half-way up, for each layer
        by_samples = sweep.plan.count_traffic(ways[0])
        sweep.close()
        memory = group.least(self.context.memory - resident_bytes(self.context.device)) + resident_bytes(self.context.device)
        with group.agreeing(CapacityError):
            whole = self._open(kept, replace(self.context, group=ProcessGroup(), memory=memory))
        self._shares_layers = group.tell(whole.plan.count_traffic(ways[1]) < by_samples)
        if self._shares_layers:
            whole.scorers = group
            return whole
        whole.close()
        return self._open(kept, self.context)

    def _open(self, kept: set[int], context: Context) -> Sweep:
        from ..sweep.sweep import open_sweep

        layers = set(self.model.layers)
        ids, mask = (part[: self.used_samples] for part in self.calibration.load())
        return open_sweep(
            self.model.without_layers(layers - kept) if kept < layers else self.model,
            (ids, mask),
            context,
            need=self.measure.need,
            keep=self.measure.keep,
            divisible=self.measure.need != "weight gradients",
        )
