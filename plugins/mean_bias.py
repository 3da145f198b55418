"""Move each layer's output by the mean of what is missing there, where the layer has a bias that can take it.

The bias of the projection that writes to the layer's output grows by E[h - h'] over its gain: the part of a correction that
needs no Gram matrix. Without a bias it would take a new parameter, which other programs would not load.
Sizes: N tokens that are not padding, D hidden.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from gradmap_pipeline import (
    CalibrationSet,
    Compensation,
    Context,
    CorrectedSite,
    Estimate,
    ModelError,
    ModelGraph,
    Rehearsal,
    Stage,
    StageError,
    Survey,
    TensorFile,
    Work,
    hookimpl,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradmap_pipeline.model.sites import Site
    from gradmap_pipeline.model.streams import Streams


class MeanBias(Stage):
    """Add the mean of what is missing to the biases of projections, from the first removed layer up."""

    name = "mean_bias"
    parallel = True

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        compensation: Compensation
        work: Work

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"model": inputs.get("model")}

    def inspect(self, inputs: Mapping[str, Any], survey: Survey) -> None:
        survey.check_layerwise()
        sites = survey.find_sites()
        if sites and not any(_find_bias(found) for found in sites.values()):
            raise ModelError(
                "no layer has a bias where it writes to its output, so a mean cannot be added without changing the architecture; "
                "use project_compensate"
            )

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        model, calibration = inputs.get("model"), inputs.get("calibration")
        if model is None or model.layers is None or calibration is None or calibration.sequence_length is None:
            return None
        return rehearsal.two_streams(model.layers, calibration.samples, calibration.sequence_length, 0, model.layers)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.data import check_tokenizer
        from gradmap_pipeline.model.streams import open_streams

        check_tokenizer(inputs.calibration, inputs.model)
        started = time.perf_counter()
        graph = inputs.model
        if not graph.removed:
            raise StageError("the model has all its layers, so there is nothing to correct; put prune before this step")
        known = Survey(graph, context.memory).find_sites()
        layers = [layer for layer in graph.layers if layer + 1 >= graph.removed[0] and _find_bias(known.get(layer, ()))]
        streams = open_streams(graph, inputs.calibration, context, 0)
        corrected: list[CorrectedSite] = []
        patches: dict[str, TensorFile] = {}
        with context.progress("correct layers", len(layers), "layer") as advance:
            for layer in layers:
                done, new = move_bias(streams, layer, known[layer], context)
                corrected.append(done)
                patches |= new
                advance()
        context.note(f"biases of {len(corrected)} layers moved by the mean of what is missing")
        return self.Outputs(
            model=graph.with_patches(patches, "compensated"),
            compensation=Compensation(sites=tuple(corrected)),
            work=Work(rounds=(streams.work(time.perf_counter() - started),)),
        )


def _find_bias(sites: Sequence[Site]) -> Site | None:
    return next((site for site in sites if site.kind != "attention" and site.bias), None)


def move_bias(streams: Streams, layer: int, sites: Sequence[Site], context: Context) -> tuple[CorrectedSite, dict[str, TensorFile]]:
    """b ← b + E[h - h'] / gain at one layer, in the pruned stream and in a file."""
    from gradmap_pipeline.model.correction import write_patches
    from gradmap_pipeline.model.streams import Drift

    site = _find_bias(sites)
    assert site is not None
    position, drift, missing = streams.graph.layers.index(layer), Drift(), 0.0
    with streams.pruned.look(layer) as step:
        for visit in step:
            drifted, target = visit.output[visit.mask].double(), streams.target(position, visit.batch)[visit.mask].double()
            drift.add(drifted, target)
            missing += float((target - drifted).square().sum())
    drift.join(streams.group)
    missing = streams.group.sum_values({"missing": missing})["missing"]
    with streams.pruned.model.layer(layer) as module:
        bias = module.get_parameter(f"{site.name}.bias").detach().double()
    patches = write_patches(streams, layer, {f"{site.name}.bias": bias - drift.mean / site.gain}, context)
    restored = drift.tokens * drift.shift**2 / max(missing, 1e-300)
    corrected = CorrectedSite(
        layer=layer,
        parameter=f"{site.name}.bias",
        kind="norm" if site.kind == "norm" else "output",
        shift=drift.shift,
        relative_shift=drift.relative_shift,
        missing_left=1 - restored,
    )
    return corrected, patches


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [MeanBias]
