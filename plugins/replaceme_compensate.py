"""ReplaceMe: the layer before each cut learns, by least squares, to do what the removed layers did.

Source: https://arxiv.org/abs/2505.02819, the closed form (LS): with M the output of the feed-forward part before the cut and R
what is missing after it, A = (MᵀM + λI)⁻¹ Mᵀ(R + M) is multiplied into the down-projection. Of several cuts, each is fitted on the
model with those below it in place.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    CalibrationSet,
    Compensation,
    Context,
    CorrectedSite,
    Estimate,
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
    from collections.abc import Mapping


class ReplacemeCompensate(Stage):
    """Multiply the down-projection before each cut by the least-squares stand-in for the removed layers (ReplaceMe)."""

    name = "replaceme_compensate"
    parallel = True

    ridge: float = Field(0.0, ge=0, description="λ over the mean diagonal of MᵀM; the factor shrinks towards zero. Published: 0.")

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

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        model, calibration = inputs.get("model"), inputs.get("calibration")
        if model is None or model.layers is None or calibration is None or calibration.sequence_length is None:
            return None
        from gradmap_pipeline.model.ridge import room_for

        width = rehearsal.trial.hidden_size
        cuts = min(len(rehearsal.graph.layers) - model.layers, model.layers)
        room = room_for(width, width)
        flops = cuts * (4 * calibration.samples * calibration.sequence_length * width * width + width**3 * 7 / 3)
        passes = rehearsal.two_streams(model.layers, calibration.samples, calibration.sequence_length, room, cuts)
        return passes + Estimate(flops=flops, seconds=flops * rehearsal.rates.double_flop)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.data import check_tokenizer
        from gradmap_pipeline.model.correction import correct_site, layers_before_cuts, sites_of
        from gradmap_pipeline.model.ridge import room_for
        from gradmap_pipeline.model.streams import open_streams

        check_tokenizer(inputs.calibration, inputs.model)
        started = time.perf_counter()
        graph = inputs.model
        layers = layers_before_cuts(graph)
        known = Survey(graph, context.memory).find_sites()
        _, width = graph.map_sizes()
        streams = open_streams(graph, inputs.calibration, context, room_for(width, width))
        corrected: list[CorrectedSite] = []
        patches: dict[str, TensorFile] = {}
        with context.progress("correct layers", len(layers), "layer") as advance:
            for layer in layers:
                writing = [site for site in sites_of(streams, layer, known) if site.kind == "output"]
                if not writing:
                    raise StageError(f"layer {layer} has no linear map that writes to its output, which this method needs")
                options: dict[str, Any] = {"space": "output", "ridge": self.ridge, "towards": "zero"}
                done, new = correct_site(streams, layer, writing[-1], context, **options)
                corrected.append(done)
                patches |= new
                context.note(f"layer {layer}: {1 - done.missing_left:.1%} of the missing residual restored in {done.parameter}")
                advance()
        return self.Outputs(
            model=graph.with_patches(patches, "compensated"),
            compensation=Compensation(sites=tuple(corrected)),
            work=Work(rounds=(streams.work(time.perf_counter() - started),)),
        )


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ReplacemeCompensate]
