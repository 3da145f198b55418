"""GradMAP's second stage: correct the drift that removed layers leave, in closed form, inside projections that are there already.

Source: https://arxiv.org/abs/2602.14649; here the exact ridge optimum stands in for a short training of the same objective.
Sizes: N tokens that are not padding, F inputs of the down-projection, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from gradmap_pipeline import (
    CapacityError,
    Context,
    CorrectedSite,
    Estimate,
    Forecasts,
    LayerCompensation,
    LayersLeft,
    ModelCosts,
    ModelError,
    ModelGraph,
    NoSiteError,
    Site,
    Stage,
    StageError,
    Streams,
    StreamWork,
    StructureProbe,
    TensorFile,
    check_rescaling,
    correct_site,
    find_writers,
    hookimpl,
    layers_before_cuts,
    nearest_scale,
    rescale_stream,
    room_for,
    sites_of,
)


class ProjectCompensate(LayerCompensation):
    """Fold a ridge correction of the drift after removed layers into projections; no parameter is added."""

    name = "project_compensate"

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

    rescale: bool = Field(
        False,
        description="First bring the residual stream back to its size at each cut, by dividing what is written above it; what is "
        "missing then is corrected.",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> ProjectCompensate:
        if self.sites is not None and not self.site.startswith("largest"):
            raise ValueError(f"'sites' counts the layers of largest shift; site {self.site!r} names its layers itself")
        return self

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()
        sites = probe.find_sites()
        if sites and not any(sites.values()):
            raise ModelError(
                "a correction cannot be folded into any layer: none has a linear map or a norm that writes to the residual stream "
                "unchanged; leave project_compensate out"
            )
        if self.rescale:
            check_rescaling(probe)

    def estimate_streams(self, left: LayersLeft, samples: int, tokens: int, costs: ModelCosts) -> Estimate:
        numbers = {"every_layer": left.count_drifting(), "before_cuts": left.count_before_cuts()}
        sites = numbers.get(self.site, self.sites or 1)
        inputs, width = costs.graph.map_sizes()
        corrected = [inputs, *([costs.graph.attention_inputs()] if self.attention else [])]
        sizes = corrected if self.space == "input" else [width for _ in corrected]
        measured = (sites - 1) * left.count if self.site.startswith("largest") else 0  # first by the pass through the model
        scaled = left.count if self.rescale else 0
        again = sites * (1 if self.attention else 0) + measured + scaled  # the look at an output is the pass that goes on
        try:
            work = StreamWork(self.room(costs.graph), again)
            if self.goes_up():  # each layer stays for all that is done with it
                keeps_inputs = self.space == "input" and costs.dtype == "float32"
                work = replace(work, goes_up=True, loads=(0, 0), taken=4 * samples * tokens * inputs if keeps_inputs else 0)
            both = costs.two_streams(left.count, samples, tokens, work)
        except CapacityError as error:
            if self.space == "input":
                error.by_option = {**error.by_option, "space": "use space: output"}
            raise
        values = sites * width * sum(corrected)
        given = costs.given(values * costs.stored_layer_bytes // sum(costs.layer_elements.values()))
        return sum((costs.speed.correction(size, width, samples * tokens) * sites for size in sizes), both + given)

    def check(self, graph: ModelGraph) -> None:
        drifting = sum(layer + 1 >= graph.removed[0] for layer in graph.layers)
        if self.site == "before_cuts":
            layers_before_cuts(graph)
        if self.sites is not None and self.sites > drifting:
            raise StageError(f"'sites' is {self.sites}, but the model has only {drifting} layers that drift")

    def goes_up(self) -> bool:
        return self.site in ("every_layer", "before_cuts") and not self.rescale

    def prepare(self, streams: Streams, context: Context) -> dict[str, TensorFile]:
        if not self.rescale:
            return {}
        streams.writers = find_writers(streams.graph, context)
        scales, patches = rescale_stream(streams, nearest_scale, context)
        for layer, scale in scales.items():
            context.note(f"the stream is multiplied by {scale:.4g} below layer {layer}")
        return patches

    def room(self, graph: ModelGraph) -> int:
        return room_for(*self._size(graph))

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        graph = streams.graph
        if self.site == "every_layer":
            yield from (layer for layer in graph.layers if layer + 1 >= graph.removed[0])
        elif self.site == "before_cuts":
            yield from layers_before_cuts(graph)
        else:
            yield from self._choose_largest(streams)

    def correct(
        self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Context
    ) -> tuple[list[CorrectedSite], dict[str, TensorFile]]:
        return correct_layer(streams, layer, known, self, context)

    def _size(self, graph: ModelGraph) -> tuple[int, int]:
        """Inputs and outputs of a correction, by the matrix with the most inputs."""
        widest, width = graph.map_sizes()
        return widest if self.space == "input" else width, width

    def _choose_largest(self, streams: Streams) -> Iterator[int]:
        """The layer that has drifted most, measured again after each."""
        tried: list[int] = []
        for _ in range(self.sites or 1):
            drift = streams.measure_drift()
            free = {layer: at for layer, at in drift.items() if layer not in tried}
            is_relative = self.site == "largest_relative_shift"
            tried.append(max(free, key=lambda layer: free[layer].relative_shift if is_relative else free[layer].shift))
            yield tried[-1]


def correct_layer(
    streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], stage: ProjectCompensate, context: Context
) -> tuple[list[CorrectedSite], dict[str, TensorFile]]:
    """Correct one layer at each of its sites that the options name, in the order in which they write.

    Raises `NoSiteError` where the layer has no place for it.
    """
    sites = sites_of(streams, layer, known)
    writing = [site for site in sites if site.role != "attention"]
    chosen = sites if stage.attention or not writing else writing
    corrected: list[CorrectedSite] = []
    patches: dict[str, TensorFile] = {}
    refusal = NoSiteError(f"layer {layer} has no linear map and no norm that writes to the residual stream unchanged")
    solve = partial(correct_site, space=stage.space, ridge=stage.ridge, shrink=stage.shrink)
    streams.pruned.run_up_to(layer)
    with streams.pruned.model.layer(layer):  # stays open for all sites, and until what leaves it is known
        for site in chosen:
            try:
                with streams.group.agreeing(NoSiteError):
                    done, new = solve(streams, layer, site, context)
            except NoSiteError as error:
                refusal = error
            else:
                corrected.append(done)
                patches |= new
        if layer != streams.graph.layers[-1]:
            streams.pruned.run_up_to(layer, through=True)
    if not corrected:
        raise refusal
    return corrected, patches


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ProjectCompensate]
