"""GradMAP's second stage: correct the drift that removed layers leave, in closed form, inside a down-projection.

Source: https://arxiv.org/abs/2602.14649; here the exact ridge optimum stands in for a short training of the same objective.
Sizes: N tokens that are not padding, F inputs of the down-projection, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    Artifact,
    CalibrationSet,
    CapacityError,
    Context,
    Estimate,
    ModelError,
    ModelGraph,
    Rehearsal,
    Stage,
    StageError,
    Survey,
    TensorFile,
    hookimpl,
)

if TYPE_CHECKING:
    import torch

    from gradmap_pipeline.model.layerwise import LayerwiseModel
    from gradmap_pipeline.model.ridge import ChannelMoments, Moments
    from gradmap_pipeline.model.sites import NoSiteError, Site
    from gradmap_pipeline.model.streams import Drift, Streams

Space = Literal["input", "output"]


class CorrectedSite(BaseModel):
    """What was done at one layer."""

    layer: int
    """Base layer whose down-projection takes the correction."""
    parameter: str
    kind: Literal["output", "norm", "attention"] = "output"
    """`output`: a linear map that writes to the layer's output; `norm`: a norm that does; `attention`: a linear map before the
    feed-forward part, corrected for what was missing when the layer began."""
    shift: float
    """‖E[h'] - E[h]‖ at the layer's output, before the correction."""
    relative_shift: float
    """Shift over the mean norm of h."""
    missing_left: float
    """Share of the squared missing residual that the correction leaves, on the calibration tokens."""


class Compensation(Artifact):
    """Where a pruned model was corrected, and how far it had drifted there."""

    sites: tuple[CorrectedSite, ...]
    shifts: dict[int, float]
    """Mean shift by kept base layer, before any correction."""


class ProjectCompensate(Stage):
    """Fold a ridge correction of the drift after removed layers into down-projections; no parameter is added."""

    name = "project_compensate"
    parallel = True

    space: Space = Field(
        "input",
        description="`input`: add a matrix to the down-projection. `output`: multiply it by one near the identity.",
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

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        compensation: Compensation

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
        flops = sites * (products + solution)
        between = {"every_layer": sites, "before_cuts": model.layers}.get(self.site, (sites - 1) * model.layers)
        again = sites + between  # a corrected layer runs again, with those above it that come before the next
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
        sites = Survey(graph, context.memory).find_sites()
        give_back()
        streams = open_streams(graph, inputs.calibration, context, room_for(*self._size(graph)))
        drift = streams.measure_drift()
        corrected: list[CorrectedSite] = []
        left_out: list[NoSiteError] = []
        patches: dict[str, TensorFile] = {}
        planned = self._choose_all(graph)
        count = len(planned) if planned else self.sites or 1
        with context.progress("correct layers", count, "layer") as advance:
            for number in range(count):
                layer = planned[number] if planned else self._choose_largest(streams.measure_drift(), corrected)
                try:
                    site, new_patches = correct_layer(streams, layer, sites, self, context)
                except NoSiteError as error:
                    if not planned:
                        raise
                    left_out.append(error)
                else:
                    corrected.append(site)
                    patches |= new_patches
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
        )

    def _size(self, graph: ModelGraph) -> tuple[int, int]:
        """Inputs and outputs of a correction, by the matrix with the most inputs."""
        shapes = [
            tensor.shape for layer in graph.layers for tensor in graph.layer_tensors(layer).values() if len(tensor.shape) == 2
        ]
        dimensions = Counter(size for shape in shapes for size in shape)
        width = dimensions.most_common(1)[0][0] if dimensions else 0  # hidden: what most matrices start from or end at
        widest = max((inputs for _, inputs in shapes), default=width)
        return widest if self.space == "input" else width, width

    def _choose_all(self, graph: ModelGraph) -> list[int]:
        """Layers to correct in order, where the options name them without a measurement."""
        after_first_cut = [layer for layer in graph.layers if layer + 1 >= graph.removed[0]]
        if self.site == "every_layer":
            return after_first_cut
        if self.site != "before_cuts":
            return []
        before = [layer for layer in after_first_cut if layer + 1 in graph.removed]
        if not before:
            raise StageError("site 'before_cuts' needs a kept layer below a removed one, and none is; use 'every_layer'")
        return before

    def _choose_largest(self, drift: dict[int, Drift], corrected: list[CorrectedSite]) -> int:
        free = {layer: at for layer, at in drift.items() if layer not in {site.layer for site in corrected}}
        if not free:
            raise StageError(f"'sites' is {self.sites}, but the model has only {len(drift)} layers that drift")
        if self.site == "largest_relative_shift":
            return max(free, key=lambda layer: free[layer].relative_shift)
        return max(free, key=lambda layer: free[layer].shift)


def correct_layer(
    streams: Streams, layer: int, sites: Mapping[int, Site | None], stage: ProjectCompensate, context: Context
) -> tuple[CorrectedSite, dict[str, TensorFile]]:
    """Solve for the correction at one layer, put it into the pruned stream, and write the patched tensors.

    `sites`: by layer, those that are known already.

    Raises `NoSiteError` where the layer has no place for it.
    """
    import torch

    from gradmap_pipeline.model.sites import NoSiteError

    model = streams.pruned.model
    site, moments, drift = collect_moments(streams, layer, sites, stage.space, context)
    if moments.missing == 0:
        raise NoSiteError(f"layer {layer} can be corrected only for what was missing before it, and nothing was")
    new, left = solve_site(model, layer, site, moments, stage)
    patches = {}
    for parameter, value in new.items():
        name = model.disk_name(layer, parameter)
        stored = streams.graph.stored_tensor(name)
        rounded = value.to(getattr(torch, streams.graph.dtype or stored.torch_dtype)).contiguous().cpu()
        patches[name] = TensorFile.save({name: rounded}, context.folder / f"{name}.safetensors")
        model.override(layer, parameter, rounded)
    streams.pruned.invalidate_from(layer)
    corrected = CorrectedSite(
        layer=layer,
        parameter=f"{site.name}.weight",
        kind=site.kind,
        shift=drift.shift,
        relative_shift=drift.relative_shift,
        missing_left=left,
    )
    return corrected, patches


def solve_site(
    model: LayerwiseModel, layer: int, site: Site, moments: Moments | ChannelMoments, stage: ProjectCompensate
) -> tuple[dict[str, torch.Tensor], float]:
    """New values of a site's parameters, fp64, and the share of the missing residual that they leave. Overwrites the sums."""
    from gradmap_pipeline.model.ridge import ChannelMoments

    name = f"{site.name}.weight"
    if isinstance(moments, ChannelMoments):
        with model.layer(layer) as module:
            parameters = {key: value.detach().double() for key, value in module.get_submodule(site.name).named_parameters()}
        scale, shift, left = moments.solve(stage.ridge, shift="bias" in parameters)
        new = {name: parameters["weight"] + scale}
        if "bias" in parameters:
            new[f"{site.name}.bias"] = parameters["bias"] + shift / site.gain
        return new, left
    x, left = moments.solve(stage.ridge)
    with model.layer(layer) as module:
        weight = module.get_parameter(name).detach().double()
        weight = weight.T if site.transposed else weight  # (D, F)
        new = {name: weight + (x.T if stage.space == "input" else x.T @ weight)}
        bias = module.get_submodule(site.name).bias
        if stage.space == "output" and bias is not None:
            new[f"{site.name}.bias"] = bias.detach().double() + x.T @ bias.detach().double()
        if site.transposed:
            new[name] = new[name].T
    return new, left


def collect_moments(
    streams: Streams, layer: int, sites: Mapping[int, Site | None], space: Space, context: Context
) -> tuple[Site, Moments | ChannelMoments, Drift]:
    """Run the layer once more in the pruned stream and sum what the ridge problem needs."""
    import torch

    from gradmap_pipeline.model.ridge import ChannelMoments, Moments, check_room
    from gradmap_pipeline.model.sites import NoSiteError, check_gain, find_site
    from gradmap_pipeline.model.streams import Drift, capture

    position = streams.graph.layers.index(layer)
    streams.pruned.invalidate_from(layer)
    for step in streams.pruned.forward():
        if step.layer != layer:
            continue
        hidden = streams.pruned.boundary(position, 0)
        call = (streams.pruned.model, layer, hidden, streams.pruned.arguments(0, layer))
        site = sites[layer] if layer in sites else find_site(*call)
        if site is None:
            raise NoSiteError(f"layer {layer} has no linear map and no norm that writes to the residual stream unchanged")
        check_gain(*call, site)
        size, width = (site.inputs if space == "input" else hidden.shape[-1]), hidden.shape[-1]
        zeros = {"dtype": torch.float64, "device": hidden.device}
        moments: Moments | ChannelMoments
        if site.kind == "norm":
            moments = ChannelMoments(torch.zeros(4, width, **zeros))
        else:
            check_room(size, width, context.memory, context.device)
            moments = Moments(torch.zeros(size, size, **zeros), torch.zeros(size, width, **zeros), 0.0)
        drift = Drift()
        with capture(streams.pruned.model, layer, site, space) as captured:
            for visit in step:
                drifted, target = visit.output[visit.mask].double(), streams.target(position, visit.batch)[visit.mask].double()
                missing = target - drifted if site.kind != "attention" else streams.missing_before(layer, visit)
                moments.add(captured.pop().reshape(*visit.mask.shape, -1)[visit.mask], missing)
                drift.add(drifted, target)
        moments.join(streams.group)
        drift.join(streams.group)
        return site, moments, drift
    raise AssertionError(f"layer {layer} is not in the sweep")


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ProjectCompensate]
