"""Refit the kept layers next to cuts by gradient, one after another, until each hands on what the original model does there.

Source: the layers beside a cut alone are tuned in https://arxiv.org/abs/2510.23652 (cutoff endpoint tuning), by the loss of the
whole model. Here each is tuned by what leaves it, so that one layer and its optimiser are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gradmap_pipeline import (
    HELD_OUT,
    Artifact,
    CalibrationSet,
    CapacityError,
    Context,
    Estimate,
    Forecasts,
    LayersLeft,
    ModelCosts,
    ModelError,
    ModelGraph,
    NotFiniteError,
    OptionError,
    Outlook,
    Refit,
    RefitSettings,
    Round,
    Stage,
    StageError,
    Streams,
    StreamWork,
    StructureProbe,
    TensorFile,
    Work,
    check_tokenizer,
    count_batch_samples,
    count_best_bytes,
    disk_for_refit,
    explain_nonfinite,
    hookimpl,
    known,
    measure_room_for_refit,
    open_streams,
    put_values,
    refit_layer,
    room_for_refit,
)

if TYPE_CHECKING:
    import torch

_ERRORS = "errors"
"""Name, beside those of parameters, under which the errors of a layer are kept: no parameter has one without a dot."""


class RefitLayer(BaseModel):
    """What became of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    """Base layer."""
    before: float
    """Mean over held-out tokens of ‖h' - h‖² / ‖h‖², h' what leaves the layer and h what the original hands on."""
    after: float
    step: int
    """After which the error was least; 0: the layer is as it was."""


class RefitReport(Artifact):
    """What refitting did, layer by layer."""

    layers: tuple[RefitLayer, ...]


class RefitLayers(Stage):
    """Train the kept layers next to cuts, one at a time, to hand on what the original model does; no parameter is added."""

    name = "refit_layers"
    parallel = True

    layers: Literal["next_to_cuts", "all_after_first_cut"] = Field(
        "all_after_first_cut",
        description="Which layers to refit, from the bottom up: those right below and right above removed ones, or every one from "
        "the first removal up.",
    )
    steps: int = Field(300, ge=1, description="Steps of Adam for each layer.")
    learning_rate: float = Field(
        0.02, gt=0, lt=1, description="Size of a step, relative to the root mean square of each parameter; it falls to 0."
    )
    batch_size: int = Field(4, ge=1, description="Samples that a step takes.")

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        refit: RefitReport
        work: Work

    def forecast(self, inputs: Forecasts) -> Outlook:
        samples = inputs.of(CalibrationSet).samples
        if samples is not None:
            check_samples(samples, self.batch_size)
        return {"model": inputs.of(ModelGraph)}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        samples = inputs.of(CalibrationSet).samples
        probe.check_shares(self.batch_size)
        if samples is not None:
            check_samples(samples, self.batch_size, probe.processes)
        probe.check_layerwise()
        try:
            probe.check_gradients()
        except ModelError as error:
            raise ModelError(f"{str(error).partition(';')[0]}; leave refit_layers out") from None

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        text, model = inputs.of(CalibrationSet), inputs.of(ModelGraph)
        left = LayersLeft(costs.graph.layers, known(model.layers), model.kept)
        samples, tokens = known(text.samples), known(text.sequence_length)
        together = count_batch_samples(self.batch_size, samples, tokens)
        refit = left.count_next_to_cuts() if self.layers == "next_to_cuts" else left.count_drifting()
        needs = costs.needs(left.count, samples, tokens)
        room = room_for_refit(needs, together, count_best_bytes(costs.graph))
        try:
            work = StreamWork(room, goes_up=True, purpose="weights, gradients and moments of a layer")
            both = costs.two_streams(left.count, samples, tokens, work)
        except CapacityError as error:
            error.by_option = {**error.by_option, "batch_size": "lower 'batch_size'"}
            raise
        one = costs.benchmark.layer_pass(together, tokens, weight_gradients=True)
        trained, looked = refit * self.steps * self.batch_size, refit * 12 * samples / HELD_OUT
        layers = refit * costs.stored_layer_bytes // len(costs.graph.layers)
        updated = refit * self.steps * max(costs.layer_elements.values())
        return (
            both
            + costs.given(2 * layers, 2)
            + Estimate(  # as finished work, and as what comes out
                disk_bytes=both.disk_bytes + 2 * layers + disk_for_refit(needs),
                flops=trained * (one.flops + one.backward_flops) + looked * one.flops,
                seconds=trained * (one.forward_for_backward + one.backward) + looked * one.forward + updated * costs.speed.update,
            )
        )

    def run(self, inputs: Any, context: Context) -> Any:
        graph: ModelGraph = inputs.model
        calibration: CalibrationSet = inputs.calibration
        check_tokenizer(calibration, graph)
        if not graph.removed:
            raise StageError("the model has all its layers, so there is nothing to refit; put prune before this step")
        samples, tokens = calibration.load()[0].shape
        group = context.group
        own, own_step = samples // group.size, group.split(self.batch_size)
        try:
            check_samples(samples, self.batch_size, group.size)
        except OptionError as error:
            raise StageError(f"'{error.option}': {error}") from None
        started = time.perf_counter()
        together = count_batch_samples(own_step, own, tokens)
        with group.agreeing(CapacityError):
            room = measure_room_for_refit(graph, own, tokens, together, context)
        streams = open_streams(graph, calibration, context, room, together, goes_up=True)
        streams.take_scales(find_scales(context))
        chosen = self.choose(graph)
        patches: dict[str, TensorFile] = {}
        done: list[RefitLayer] = []
        with context.progress("refit layers", len(chosen) * self.steps, "step") as advance:
            for layer in chosen:
                key = [graph.digest, calibration.digest, self.model_dump(mode="json"), context.seed, layer]
                reached = 0

                def count(units: int = 1, /, *, detail: str = "") -> None:
                    nonlocal reached
                    reached += units
                    advance(units, detail=detail)

                folder = None if context.keep_folder is None else context.keep_folder(["state", group.size, *key])

                def compute(layer: int = layer, count: Any = count, folder: Path | None = folder) -> dict[str, torch.Tensor]:
                    return pack(self._refit(streams, layer, count, context, folder))

                streams.go_up_to(layer, context)
                with streams.pruned.model.layer(layer):  # stays until what leaves it is known
                    values = context.remember_tensors(key, compute)
                    advance(self.steps - reached)
                    one = unpack(layer, values)
                    patches |= self._use(streams, layer, values, context)
                done.append(one)
                context.note(tell(one))
        return self.Outputs(
            model=graph.with_patches(patches, "refit"),
            refit=RefitReport(layers=tuple(done)),
            work=Work(rounds=(self._count(streams, len(chosen), samples, time.perf_counter() - started),)),
        )

    def choose(self, graph: ModelGraph) -> list[int]:
        """Base layers to refit, from the bottom up."""
        if self.layers == "next_to_cuts":
            return [layer for layer in graph.layers if {layer - 1, layer + 1} & set(graph.removed)]
        return [layer for layer in graph.layers if layer + 1 >= graph.removed[0]]

    def _refit(self, streams: Streams, layer: int, count: Any, context: Context, folder: Path | None) -> Refit:
        settings = RefitSettings(self.steps, self.learning_rate, self.batch_size, context.seed)
        try:
            made = refit_layer(streams, layer, settings, count, folder)
        except NotFiniteError as error:
            graphs, batches = [streams.graph.dense, streams.graph], streams.pruned.batches
            told = explain_nonfinite(str(error), graphs, batches, context.device, context.dtype, context.folder)
            raise told or StageError(f"{error} is not a finite number in {context.dtype}") from None
        if made.left_out:
            context.note(f"layer {layer}: not refit, as the checkpoint stores them in several parts: {', '.join(made.left_out)}")
        return made

    def _use(self, streams: Streams, layer: int, values: Mapping[str, torch.Tensor], context: Context) -> dict[str, TensorFile]:
        """Write the new tensors, and go on in the pruned stream with them."""
        pruned, patches = streams.pruned, {}
        new = {name: value for name, value in values.items() if name != _ERRORS}
        pruned.run_up_to(layer)
        with pruned.model.layer(layer) as module:
            put_values(module, new)
            for parameter, value in new.items():
                name = pruned.model.disk_name(layer, parameter)
                patches[name] = TensorFile.save({name: value.contiguous()}, context.folder / f"{name}.safetensors")
            if layer != streams.graph.layers[-1]:
                pruned.run_up_to(layer, through=True)
        return patches

    def _count(self, streams: Streams, layers: int, samples: int, seconds: float) -> Round:
        """What was computed; a pass of a share of the samples through a layer counts as that share."""
        both = streams.work(seconds)
        trained = layers * self.steps * self.batch_size / samples
        return both.model_copy(
            update={"layer_forwards": both.layer_forwards + trained + layers * 12 / HELD_OUT, "layer_backwards": trained}
        )


def check_samples(samples: int, batch_size: int, processes: int = 1) -> None:
    """Raise `OptionError` where samples, shared by processes, are too few to hold some out and take a step on others."""
    own = samples // processes
    left = (own - max(1, own // HELD_OUT)) * processes
    if own < HELD_OUT or batch_size > left:
        shared = "" if processes == 1 else f", shared by {processes} processes"
        what = f"the calibration set has {samples:,} samples{shared}, and one in {HELD_OUT} is held out"
        if own < HELD_OUT:
            raise OptionError("batch_size", f"{what}; calibrate on at least {HELD_OUT * processes}")
        raise OptionError("batch_size", f"found {batch_size:,}; {what}: at most {left:,} are left for a step")


def find_scales(context: Context) -> dict[int, float]:
    """What earlier steps multiplied the residual stream by at cuts on purpose, by the base layer above the cut."""
    scales: dict[int, float] = {}
    for step in context.lineage:
        made = step.outputs.get("compensation")
        told = made.get("scales", {}) if isinstance(made, dict) else {}
        scales |= {int(layer): float(scale) for layer, scale in told.items()}
    return scales


def pack(refit: Refit) -> dict[str, torch.Tensor]:
    """A layer's new values and its errors, as tensors."""
    import torch

    return {**refit.values, _ERRORS: torch.tensor([refit.before, refit.after, refit.step], dtype=torch.float64)}


def unpack(layer: int, values: Mapping[str, torch.Tensor]) -> RefitLayer:
    """The errors of `pack`."""
    before, after, step = values[_ERRORS].tolist()
    return RefitLayer(layer=layer, before=before, after=after, step=int(step))


def tell(one: RefitLayer) -> str:
    """What became of a layer, in a line."""
    if not one.step:
        return f"layer {one.layer}: left as it is; no step lowered its error on held-out samples, {one.before:.4g}"
    return f"layer {one.layer}: error on held-out samples {one.before:.4g} → {one.after:.4g}, best after step {one.step}"


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [RefitLayers]
