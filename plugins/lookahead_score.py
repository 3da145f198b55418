"""Look ahead: remove the layer without which the corrected model predicts most like the original, and search again in what is left.

After each removal the model is corrected anew, as `project_compensate` does it. For a candidate, the layer below it is corrected as
if the candidate were gone; the KL divergence from the original model's predictions, on samples that no correction was solved on,
is the candidate's score. A candidate's increase of the divergence changes little from one decision to the next, so the queue is
worked off lazily, as in Minoux's accelerated greedy algorithm, https://doi.org/10.1007/BFb0006528: candidates are tried again in
the order of their last increase until the least of all has been tried in this round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from gradmap_pipeline import (
    CalibrationSet,
    Context,
    CorrectedModel,
    Decision,
    Estimate,
    Forecasts,
    LayerScoring,
    ModelCosts,
    ModelGraph,
    OptionError,
    Outlook,
    Round,
    Scoring,
    Stage,
    StageError,
    StreamWork,
    StructureProbe,
    divide_samples,
    hookimpl,
    room_for,
    take_lowest,
)

_HELD_OUT = 1 / 3
"""Share of the samples that predictions are compared on."""
_RETRIED = 0.15
"""Share of the candidates that a decision is thought to try again, for estimates."""
_PASSES = 2.0
"""Of a layer that is corrected at two places, for estimates: up to the first, to the second, and through."""
_DIVERGENCE = 1.5
"""Seconds of a divergence over those of a loss, for estimates."""


class LookaheadScore(LayerScoring):
    """Rank layers by how far the corrected model's predictions move without each of them, again after each removal."""

    name = "lookahead_score"
    parallel = True

    sample_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the calibration samples that layers are scored on: corrections are solved on two thirds of these, "
        "and predictions are compared on one third.",
    )
    candidates: int = Field(3, ge=1, description="Layers that each decision tries anew at least, those of the least last increase.")
    ridge: float = Field(0.1, ge=0, description="As in `project_compensate`.")
    shrink: float = Field(0.4, ge=0, description="As in `project_compensate`.")

    def describe(self) -> str:
        return "divergence of the corrected model, greedy"

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        super().inspect(inputs, probe)
        samples, processes = inputs.of(CalibrationSet).samples, probe.processes
        if samples is not None:
            used = self._count_used(samples)
            held_out = count_held_out(used)
            if min(held_out, used - held_out) < processes:
                raise OptionError(
                    "sample_share",
                    f"{used} of {samples} samples are used, {held_out} of them to compare predictions on, too few for {processes} "
                    "processes; raise it, or 'samples' of the calibration, or start fewer",
                )
        probe.find_sites()

    def forecast(self, inputs: Forecasts) -> Outlook:
        samples = inputs.of(CalibrationSet).samples
        if samples is not None:
            self._count_used(samples)
        return super().forecast(inputs)

    def _count_used(self, samples: int) -> int:
        """How many samples layers are scored on. Raises `OptionError` where they are fewer than two."""
        used = math.ceil(self.sample_share * samples)
        if used < 2:
            raise OptionError(
                "sample_share",
                f"{used} of {samples} samples are used, and corrections and predictions need one each at least; raise "
                "'sample_share', or 'samples' of the calibration",
            )
        return used

    def open_scorer(self, model: ModelGraph, calibration: CalibrationSet, context: Context) -> tuple[Any, Scoring]:
        ids, mask = calibration.load()
        used = self._count_used(len(ids))
        key = [self.sample_share, self.candidates, self.ridge, self.shrink, self.protect_first, self.protect_last]
        return key, Search(self, model, (ids[:used], mask[:used]), used / len(ids), context)

    def decide(self, kept: Sequence[int], scores: dict[int, float], wanted: int, protected: Collection[int]) -> list[Decision]:
        return take_lowest(kept, scores, 1, protected)

    def estimate_sweeps(self, depth: int, samples: int, tokens: int, costs: ModelCosts) -> Estimate | None:
        used = math.ceil(self.sample_share * samples)
        held_out = count_held_out(used)
        fit = used - held_out
        decisions, free = self.count_decisions(depth), depth - self.protect_first - self.protect_last
        tried = free + (decisions - 1) * min(free, max(self.candidates, _RETRIED * free))
        corrected = (decisions - 1) * depth / 2  # what is above a removed layer is corrected anew: half of all layers
        again = tried + _PASSES * corrected  # of the samples to fit on
        compared = depth + (tried + decisions - 1) * depth / 2  # passes of the others
        inputs, width = costs.graph.map_sizes()
        item = costs.needs(depth, 1, tokens).item_bytes
        kept = CorrectedModel.count_kept_bytes(costs.graph, (fit, held_out), tokens, costs.words, costs.dtype)
        work = StreamWork(
            room_for(inputs, width),
            round(again + compared * held_out / fit),
            beside=kept["compared"] + kept["predictions"],
            has_head=True,
            loads=(round(2 * tried - free + corrected), round(again + compared)),  # what was corrected is dropped after a try
            load_bytes=width * (inputs + costs.graph.attention_inputs()) * item // 2,  # half of all layers are corrected
        )
        sweeps = costs.two_streams(depth, fit, tokens, work)
        changed = depth * width * (inputs + costs.graph.attention_inputs()) * item  # corrected weights, which lie in a file
        written = round(changed * (decisions - 1) / 2 + tried * width * inputs * item)
        sweeps = replace(
            sweeps,
            disk_bytes=sweeps.disk_bytes + changed,
            bytes_written=sweeps.bytes_written + written,
            seconds=sweeps.seconds + written * costs.speed.write,
        )
        output = costs.speed.correction(inputs, width, fit * tokens) * (tried + corrected)
        attention = costs.speed.correction(costs.graph.attention_inputs(), width, fit * tokens) * corrected
        head = costs.benchmark.head_pass(held_out, tokens)
        predicted = (tried + decisions) * held_out
        return sweeps + output + attention + Estimate(flops=predicted * head.flops, seconds=_DIVERGENCE * predicted * head.forward)


def count_held_out(used: int) -> int:
    """How many of the samples predictions are compared on."""
    return max(1, round(_HELD_OUT * used))


class Search:
    """The model as far as it is pruned, and the candidates."""

    def __init__(self, stage: LookaheadScore, model: ModelGraph, samples: Any, share: float, context: Context) -> None:
        self.stage, self.model, self.samples, self.share, self.context = stage, model, samples, share, context
        self._opened: CorrectedModel | None = None
        self._left = set(model.layers)

    def score(self, kept: set[int], before: dict[int, float], /) -> dict[str, Any]:
        """How much each layer adds to the divergence in nats a token, as last tried, and the work it took, as JSON."""
        started = time.perf_counter()
        corrected = self._opened or self._open()
        forwards = corrected.layer_forwards if self._opened else 0.0
        self._opened = corrected
        if self._left - kept:
            corrected.remove(self._left - kept)
            self._left = set(kept)
        now = corrected.divergence() if before else 0.0
        protected = self.stage.protected(tuple(sorted(self.model.layers)))
        increases = {layer: before.get(layer, -math.inf) for layer in sorted(kept) if layer not in protected}
        tried: set[int] = set()
        while True:
            layer = min((layer for layer in increases if layer not in tried), key=increases.__getitem__, default=None)
            enough = len(tried) >= self.stage.candidates and bool(before)
            if layer is None or (enough and min(increases.values()) < increases[layer]):
                break
            increases[layer] = corrected.divergence_without(layer) - now
            if not math.isfinite(increases[layer]):
                self.close()
                raise StageError(f"the divergence without layer {layer} is not a finite number in {self.context.dtype}")
            tried.add(layer)
        work = Round(
            layer_forwards=(corrected.layer_forwards - forwards) * self.share,
            layer_backwards=0,
            seconds=time.perf_counter() - started,
        )
        return {"scores": increases, "work": work.model_dump()}

    def close(self) -> None:
        """Give back the memory of the model."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self) -> CorrectedModel:
        sites = StructureProbe(self.model, self.context.memory).find_sites()
        inputs, width = self.model.map_sizes()
        fit, compared = divide_samples(self.samples, count_held_out(len(self.samples[0])))
        options = {"ridge": self.stage.ridge, "shrink": self.stage.shrink}
        return CorrectedModel(self.model, fit, compared, sites, self.context, reserve=room_for(inputs, width), **options)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [LookaheadScore]
