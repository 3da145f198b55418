"""GradMAP's second stage: correct the drift that removed layers leave, in closed form, inside projections that are there already.

Source: https://arxiv.org/abs/2602.14649; here the exact ridge optimum stands in for a short training of the same objective.
Sizes: N tokens that are not padding, F inputs of the down-projection, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    CalibrationSet,
    CapacityError,
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
    from gradmap_pipeline.model.sites import NoSiteError, Site
    from gradmap_pipeline.model.streams import Drift, Streams


class ProjectCompensate(Stage):
    """Fold a ridge correction of the drift after removed layers into projections; no parameter is added."""

    name = "project_compensate"
    parallel = True

    space: Literal["input", "output"] = Field(
        "input",
        description="`input`: add a matrix to the projection. `output`: multiply it by one near the identity.",
    )
    attention: bool = Field(
        True,
        description="Correct the attention's output projection too, before the down-projection: for what was missing when the "
        "layer began. A layer that has no other place is corrected there in any case.",
    )
    site: Literal["largest_shift", "largest_relative_shift", "before_cuts", "every_layer"] = Field(
        "every_layer",
        description="Which layers to correct: those with the largest mean shift, absolute or relative to the mean norm; "
        "those right before removed layers; or every layer from the first removal up, in order.",
    )
    sites: int | None = Field(
        None, ge=1, description="How many layers to correct. Default: 1 for the largest shift, all of them otherwise."
    )
    ridge: float = Field(0.1, gt=0, description="Regularisation, relative to the mean diagonal of the Gram matrix.")
    shrink: float = Field(
        0.4,
        ge=0,
        description="How far a correction that explains little is held back: it is scaled by e / (e + shrink), e the share of the "
        "squared missing residual that it explains.",
    )

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        compensation: Compensation
        work: Work

    @model_validator(mode="after")
    def _check_combinations(self) -> ProjectCompensate:
        if self.sites is not None and not self.site.startswith("largest"):
            raise ValueError(f"'sites' counts the layers of largest shift; site {self.site!r} names its layers itself")
        return self

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"model": inputs.get("model")}

    def inspect(self, inputs: Mapping[str, Any], survey: Survey) -> None:
        survey.check_gradients()
        sites = survey.find_sites()
        if sites and not any(sites.values()):
            raise ModelError(
                "a correction cannot be folded into any layer: none has a linear map or a norm that writes to the residual stream "
                "unchanged; leave project_compensate out"
            )

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        model, calibration = inputs.get("model"), inputs.get("calibration")
        if model is None or model.layers is None or calibration is None or calibration.sequence_length is None:
            return None
        from gradmap_pipeline.model.ridge import room_for

        samples, tokens = calibration.samples, calibration.sequence_length
        removed = len(rehearsal.graph.layers) - model.layers
        # Which layers these are is not known yet: at most this many.
        sites = {"every_layer": model.layers, "before_cuts": min(removed, model.layers)}.get(self.site, self.sites or 1)
        size, width = self._size(rehearsal.graph)
        products = 2 * samples * tokens * size * (size + width)
        solution = size**3 / 3 + 2 * size**2 * width
        flops = sites * (products + solution) * (2 if self.attention else 1)
        between = {"every_layer": 0, "before_cuts": 0}.get(self.site, sites * model.layers)
        again = sites * (2 if self.attention else 1) + between  # once for each correction, besides the pass that goes on
        try:
            both = rehearsal.two_streams(model.layers, samples, tokens, room_for(size, width), again)
        except CapacityError as error:
            raise CapacityError(f"{error}, or use space: output" if self.space == "input" else str(error)) from None
        return both + Estimate(flops=flops, seconds=flops * rehearsal.rates.double_flop)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.data import check_tokenizer
        from gradmap_pipeline.memory import give_back
        from gradmap_pipeline.model.ridge import room_for
        from gradmap_pipeline.model.sites import NoSiteError
        from gradmap_pipeline.model.streams import open_streams

        check_tokenizer(inputs.calibration, inputs.model)
        graph = inputs.model
        if not graph.removed:
            raise StageError("the model has all its layers, so there is nothing to correct; put prune before this step")
        started = time.perf_counter()
        sites = Survey(graph, context.memory).find_sites()
        give_back()
        streams = open_streams(graph, inputs.calibration, context, room_for(*self._size(graph)))
        planned = self._choose_all(graph)
        drift = {} if planned else streams.measure_drift()
        corrected: list[CorrectedSite] = []
        left_out: list[NoSiteError] = []
        patches: dict[str, TensorFile] = {}
        count = len(planned) if planned else self.sites or 1
        with context.progress("correct layers", count, "layer") as advance:
            for number in range(count):
                layer = planned[number] if planned else self._choose_largest(streams.measure_drift(), corrected)
                try:
                    done, new = correct_layer(streams, layer, sites, self, context)
                except NoSiteError as error:
                    if not planned:
                        raise
                    left_out.append(error)
                else:
                    corrected += done
                    patches |= new
                advance()
        if not corrected:
            raise left_out[0]
        for error in left_out:
            context.note(f"left as it is: {error}")
        for site in corrected:
            context.note(
                f"layer {site.layer}: shift {site.shift:.3g} ({site.relative_shift:.1%} of the mean norm), "
                f"{1 - site.missing_left:.1%} of the missing residual restored in {site.parameter}"
            )
        return self.Outputs(
            model=graph.with_patches(patches, "compensated"),
            compensation=Compensation(sites=tuple(corrected), shifts={layer: at.shift for layer, at in drift.items()}),
            work=Work(rounds=(streams.work(time.perf_counter() - started),)),
        )

    def _size(self, graph: ModelGraph) -> tuple[int, int]:
        """Inputs and outputs of a correction, by the matrix with the most inputs."""
        widest, width = graph.map_sizes()
        return widest if self.space == "input" else width, width

    def _choose_all(self, graph: ModelGraph) -> list[int]:
        """Layers to correct in order, where the options name them without a measurement."""
        from gradmap_pipeline.model.correction import layers_before_cuts

        if self.site == "every_layer":
            return [layer for layer in graph.layers if layer + 1 >= graph.removed[0]]
        return layers_before_cuts(graph) if self.site == "before_cuts" else []

    def _choose_largest(self, drift: dict[int, Drift], corrected: list[CorrectedSite]) -> int:
        free = {layer: at for layer, at in drift.items() if layer not in {site.layer for site in corrected}}
        if not free:
            raise StageError(f"'sites' is {self.sites}, but the model has only {len(drift)} layers that drift")
        if self.site == "largest_relative_shift":
            return max(free, key=lambda layer: free[layer].relative_shift)
        return max(free, key=lambda layer: free[layer].shift)


def correct_layer(
    streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], stage: ProjectCompensate, context: Context
) -> tuple[list[CorrectedSite], dict[str, TensorFile]]:
    """Correct one layer at each of its sites that the options name, in the order in which they write.

    Raises `NoSiteError` where the layer has no place for it.
    """
    from gradmap_pipeline.model.correction import correct_site, sites_of
    from gradmap_pipeline.model.sites import NoSiteError

    sites = sites_of(streams, layer, known)
    writing = [site for site in sites if site.kind != "attention"]
    chosen = sites if stage.attention or not writing else writing
    corrected: list[CorrectedSite] = []
    patches: dict[str, TensorFile] = {}
    refusal = NoSiteError(f"layer {layer} has no linear map and no norm that writes to the residual stream unchanged")
    for site in chosen:
        try:
            done, new = correct_site(streams, layer, site, context, space=stage.space, ridge=stage.ridge, shrink=stage.shrink)
        except NoSiteError as error:
            refusal = error
        else:
            corrected.append(done)
            patches |= new
    if not corrected:
        raise refusal
    return corrected, patches


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ProjectCompensate]
