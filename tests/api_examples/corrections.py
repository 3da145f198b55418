"""A correction of a pruned model: the same tokens run through the original and the pruned model, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from gradmap_pipeline import (
    HELD_OUT,
    CapacityError,
    Compensation,
    Context,
    CorrectedSite,
    Drift,
    Estimate,
    Forecasts,
    LayerCompensation,
    LayersLeft,
    ModelCosts,
    ModelGraph,
    Moments,
    NoSiteError,
    NotFiniteError,
    Refit,
    RefitSettings,
    Site,
    Streams,
    StreamWork,
    StructureProbe,
    TensorFile,
    Trained,
    TrainingNeeds,
    TrainingPoint,
    TrainingSettings,
    Writer,
    capture_site,
    check_gain,
    check_memory_for_training,
    check_rescaling,
    check_room,
    check_room_for_training,
    collect_moments,
    correct_site,
    count_batch_samples,
    count_best_bytes,
    count_trained,
    disk_for_refit,
    find_output_site,
    find_top_choices,
    find_writers,
    layers_before_cuts,
    magnitude_ratio,
    measure_room_for_refit,
    measure_training_needs,
    nearest_scale,
    open_streams,
    open_sweep,
    put_values,
    refit_layer,
    rescale_from,
    rescale_stream,
    room_for,
    room_for_refit,
    sites_of,
    solve_site,
    train_whole,
    training_bytes,
    write_patches,
)
from gradmap_pipeline.testing import make_context, make_inputs, run_stage


class RidgeCompensate(LayerCompensation):
    """Add to the output map of the layer before each cut what ridge regression finds; three ways to the same result."""

    name = "ridge_compensate"

    way: Literal["whole", "in parts", "by hand"] = Field("whole", description="How much of the work is spelled out.")

    def room(self, graph: ModelGraph) -> int:
        return room_for(*graph.map_sizes())

    def estimate_streams(self, left: LayersLeft, samples: int, tokens: int, costs: ModelCosts) -> Estimate:
        work = StreamWork(self.room(costs.graph), again=left.count_before_cuts(), goes_up=self.goes_up())
        return costs.two_streams(left.count, samples, tokens, work)

    def check(self, graph: ModelGraph) -> None:
        layers_before_cuts(graph)  # raises StageError where there is no cut

    def goes_up(self) -> bool:
        return True  # from one cut to the next, looking at neither what is below nor what is above

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        yield from layers_before_cuts(streams.graph)

    def correct(
        self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Context
    ) -> tuple[list[CorrectedSite], dict[str, TensorFile]]:
        if not sites_of(streams, layer, known):
            raise NoSiteError(f"layer {layer} has no place for a correction")
        site = find_output_site(streams, layer, known)
        if self.way == "whole":
            done, patches = correct_site(streams, layer, site, context, space="input", ridge=0.1)
            return [done], patches
        if self.way == "in parts":
            moments, drift = collect_moments(streams, layer, site, "input", context)
            assert isinstance(moments, Moments)
        else:
            moments, drift = self._sum(streams, layer, site, context)
        new, left = solve_site(streams.pruned.model, layer, site, moments, space="input", ridge=0.1)
        patches = write_patches(streams, layer, new, context)
        done = CorrectedSite(
            layer=layer,
            parameter=f"{site.name}.weight",
            shift=drift.shift,
            relative_shift=drift.relative_shift,
            missing_left=left,
        )
        return [done], patches

    def _sum(self, streams: Streams, layer: int, site: Site, context: Context) -> tuple[Moments, Drift]:
        """What `collect_moments` does: AᵀA and AᵀR over tokens, A (n, inputs) the map's inputs, R (n, hidden) what is missing."""
        position, pruned = streams.graph.layers.index(layer), streams.pruned
        _, width = streams.graph.map_sizes()
        with streams.group.agreeing(CapacityError):  # what one of several processes lacks the memory for, none tries
            check_room(site.inputs, width, context.memory, context.device)
        gram = torch.zeros(site.inputs, site.inputs, dtype=torch.float64)
        moments, drift = Moments(gram, torch.zeros(site.inputs, width, dtype=torch.float64), 0.0), Drift()
        with pruned.look(layer) as step:
            with streams.group.agreeing(NoSiteError):  # as `streams.check_gain(layer, site)` does
                check_gain(pruned.model, layer, *pruned.probe(layer), site)
            with capture_site(pruned.model, layer, site, "input") as captured:
                for visit in step:
                    leaving = visit.output[visit.mask].double()
                    wanted = streams.target(position, visit.batch)[visit.mask].double()
                    entering = captured.pop().reshape(*visit.mask.shape, -1)[visit.mask]
                    moments.add(entering, wanted - leaving)
                    drift.add(leaving, wanted)
        streams.join(drift, layer)
        moments.join(streams.group)
        return moments, drift


inputs = make_inputs(RidgeCompensate, Path("inputs"))
results = {}
for way in ("whole", "in parts", "by hand"):
    stage = RidgeCompensate.model_validate({"way": way})
    outputs = run_stage(stage, Path(way), **inputs)
    compensation: Compensation = outputs.compensation
    results[way] = [site.missing_left for site in compensation.sites]
    assert [site.layer for site in compensation.sites] == layers_before_cuts(inputs["model"])
    assert all(0 < left < 1 for left in results[way])
assert torch.allclose(torch.tensor(results["whole"]), torch.tensor(results["in parts"]))
assert torch.allclose(torch.tensor(results["whole"]), torch.tensor(results["by hand"]))


class Rescale(LayerCompensation):
    """Bring the residual stream back to its size at cuts, without a fit of any matrix."""

    name = "rescale_only"

    ratio: Literal["nearest", "magnitude", "given"] = Field("nearest", description="How a scale is found.")

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        check_rescaling(probe)  # raises OptionError where the model depends on the size of the stream

    def prepare(self, streams: Streams, context: Context) -> dict[str, TensorFile]:
        streams.writers = find_writers(streams.graph, context)
        lowest: Writer = streams.writers[streams.graph.layers[0]][0]
        assert lowest.offset == 0  # of a Llama
        if self.ratio == "given":  # the stream is multiplied by 1.1 below the first layer above a cut
            position = sum(layer < streams.graph.removed[0] for layer in streams.graph.layers)
            return rescale_from(streams, position, 1.1, context)
        _, patches = rescale_stream(streams, nearest_scale if self.ratio == "nearest" else magnitude_ratio, context)
        return patches

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        return iter(())


for ratio in ("nearest", "magnitude", "given"):
    rescaled = run_stage(Rescale.model_validate({"ratio": ratio}), Path(ratio), **inputs)
    scales = rescaled.compensation.scales
    assert all(0.5 < scale < 2 for scale in scales.values())
    assert ratio != "given" or set(scales.values()) == {1.1}


# One layer trained by gradient, towards what the original model hands on there.
pruned, calibration = inputs["model"], inputs["calibration"]
samples, tokens = calibration.load()[0].shape
context = make_context(Path("refit"))
together = count_batch_samples(4, samples, tokens)
assert together * HELD_OUT <= samples  # batches are several, so that one can be held out
room = measure_room_for_refit(pruned, samples, tokens, together, context)  # raises CapacityError where it does not fit
assert room > 4 * 5 * max(pruned.layer_elements().values())  # as `room_for_refit(needs, together)` says of a plan's needs
assert callable(room_for_refit)
assert callable(disk_for_refit)
assert count_best_bytes(pruned) in (2, 4)
streams = open_streams(pruned, calibration, context, room, together)
lowest = layers_before_cuts(pruned)[0]
settings = RefitSettings(steps=10, learning_rate=0.01, batch_size=4, seed=0)
losses: list[str] = []
try:
    made: Refit = refit_layer(streams, lowest, settings, lambda units=1, /, *, detail="": losses.append(detail))
except NotFiniteError as error:  # what the layer computes is not finite before the first step
    raise SystemExit(str(error)) from None
assert made.after < made.before
assert len(losses) == 10
with streams.pruned.model.layer(lowest) as module:  # a later visit finds them changed where layers stay in memory; else put them in
    put_values(module, made.values)

# A model trained as a whole on what the original predicts; what it learns is merged into tensors that are there.
ids = calibration.load()[0]
training_needs: TrainingNeeds = measure_training_needs(pruned, 64, "float32", "cpu")  # what one sample takes
changing = count_trained("all", pruned.count_parameters(), len(pruned.layers), 8, training_needs.width)
lines = training_bytes(training_needs, len(pruned.layers), pruned.count_parameters(), changing, 8)
check_memory_for_training(sum(lines.values()), 2**30, "lora")  # raises CapacityError; a plan takes the sum, too
with open_sweep(pruned.dense, (ids, torch.ones_like(ids)), context) as sweep:
    found = list(find_top_choices(sweep, 16))
choices, logs = (torch.cat([part[at] for part in found]) for at in (0, 1))
plan = TrainingSettings(
    teacher_share=1.0,
    weights="lora",
    rank=4,
    alpha=8,
    steps=4,
    learning_rate=3e-3,
    batch_size=4,
    patience=3,
    held_out=2,
)
check_room_for_training(pruned, 64, plan, context)  # raises CapacityError; `train_whole` asks, too
trained: Trained = train_whole(pruned, (ids, choices, logs), plan, Path("training"), context)
assert trained.after < trained.before
assert set(trained.values) <= set(pruned.base.tensors)
last: TrainingPoint = trained.curve[-1]
assert (last.step, last.held_out is not None) == (4, True)
