"""Correct what a kept layer writes to the residual stream, in closed form, inside weights that are there already.

Sizes: N tokens that are not padding, F inputs of a linear map, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from ..artifacts import Artifact, TensorFile
from ..errors import CapacityError, StageError
from .patches import write_patches
from .site_search import find_sites
from .sites import NoSiteError, share_sites

if TYPE_CHECKING:
    import torch

    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from ..sweep.layerwise import LayerwiseModel
    from .ridge import ChannelMoments, Moments
    from .sites import Site
    from .streams import Drift, Streams

Space = Literal["input", "output"]
"""`input`: a matrix is added to a linear map; `output`: it is multiplied by one."""
Towards = Literal["identity", "zero"]
"""What the regularised factor of an output correction is near when little is known."""


class CorrectedSite(BaseModel):
    """What was done at one layer."""

    layer: int
    """Base layer whose weights take the correction."""
    parameter: str
    role: Literal["output", "norm", "attention"] = "output"
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
    shifts: dict[int, float] = Field(default_factory=dict)
    """Mean shift by kept base layer, before any correction; where the choice of layers rests on it."""
    scales: dict[int, float] = Field(default_factory=dict)
    """By the base layer right above a cut: what the residual stream is multiplied by there, with all cuts below; where it is."""


def layers_before_cuts(graph: ModelGraph) -> list[int]:
    """Kept layers right below removed ones. Raises `StageError` where there are none."""
    below = [layer for layer in graph.layers if layer + 1 in graph.removed]
    if not below:
        raise StageError("this correction needs a kept layer below a removed one, and there is none")
    return below


def sites_of(streams: Streams, layer: int, known: Mapping[int, Sequence[Site]]) -> Sequence[Site]:
    """The sites of a base layer, in the order in which they write. `known`: by layer, those that were found before."""
    if layer in known:
        return known[layer]
    pruned, group = streams.pruned, streams.group
    hidden, arguments = pruned.probe(layer)
    with group.agreeing(NoSiteError), pruned.model.layer(layer):
        sites = find_sites(pruned.model, layer, hidden, arguments)
    return share_sites({layer: sites}, group)[layer]


def find_output_site(streams: Streams, layer: int, known: Mapping[int, Sequence[Site]]) -> Site:
    """The linear map that writes to a layer's output. Raises `StageError` where there is none."""
    writing = [site for site in sites_of(streams, layer, known) if site.role == "output" and not site.norm]
    if not writing:
        raise StageError(f"layer {layer} has no linear map that writes to its output, which this correction needs")
    return writing[-1]


def correct_site(
    streams: Streams,
    layer: int,
    site: Site,
    context: Context,
    *,
    space: Space,
    ridge: float,
    shrink: float = 0.0,
    towards: Towards = "identity",
) -> tuple[CorrectedSite, dict[str, TensorFile]]:
    """Solve for the correction at one site, put it into the pruned stream, and write the patched tensors.

    `ridge`: regularisation relative to the mean diagonal of the Gram matrix. `shrink`: how far corrections that explain little
    are held back (`ridge.hold_back`).

    Raises `NoSiteError` where it has no place or no target there.
    """
    model = streams.pruned.model
    if site.role == "attention" and layer < streams.graph.removed[0]:
        raise NoSiteError(f"layer {layer} can be corrected only for what was missing before it, and nothing was")
    with streams.group.at(f"{site.name} of layer {layer}"):
        moments, drift = collect_moments(streams, layer, site, space, context)
        with streams.group.agreeing(StageError):
            new, left = solve_site(model, layer, site, moments, space=space, ridge=ridge, shrink=shrink, towards=towards)
        patches = write_patches(streams, layer, new, context, site)
    corrected = CorrectedSite(
        layer=layer,
        parameter=f"{site.name}.weight",
        role=site.role,
        shift=drift.shift * streams.scale_above(layer),
        relative_shift=drift.relative_shift,
        missing_left=left,
    )
    return corrected, patches


def can_add_change(streams: Streams, site: Site, space: Space) -> bool:
    """Whether a product with what the site took gives what leaves the corrected layer, to the digits of running it again."""
    return site.role == "output" and not site.norm and space == "input" and str(streams.pruned.model.dtype) == "torch.float32"


def solve_site(
    model: LayerwiseModel,
    layer: int,
    site: Site,
    moments: Moments | ChannelMoments,
    *,
    space: Space,
    ridge: float,
    shrink: float = 0.0,
    towards: Towards = "identity",
) -> tuple[dict[str, torch.Tensor], float]:
    """New values of a site's parameters, fp64, and the share of the missing residual that they leave. Overwrites the sums.

    `space`: `input` adds a matrix to the map, `output` multiplies it by one. `ridge`: relative to the mean diagonal of the Gram
    matrix. `towards`: what the solution shrinks to, no change (`identity`) or a map that writes nothing (`zero`). Of a map behind
    a norm, the missing residual is what it can make up for by turning what the norm writes.
    """
    import torch

    from .behind_norms import scale_behind
    from .ridge import ChannelMoments

    name = f"{site.name}.weight"
    if isinstance(moments, ChannelMoments):
        with model.layer(layer) as module:
            parameters = {key: value.detach().double() for key, value in module.get_submodule(site.name).named_parameters()}
        scale, shift, left = moments.solve(ridge, "bias" in parameters, shrink)
        new = {name: parameters["weight"] + scale}
        if "bias" in parameters:
            new[f"{site.name}.bias"] = parameters["bias"] + shift / site.gain
        return new, left
    x, left = moments.solve(ridge, shrink) if towards == "identity" else moments.solve_factor(ridge)
    with model.layer(layer) as module:
        weight = module.get_parameter(name).detach().double()
        weight = weight.T if site.is_transposed else weight  # (D, F)
        if site.norm:
            scale = scale_behind(module, site)
            x = torch.where(scale == 0, 0, x / scale)
        new = {name: weight + (x.T if space == "input" else x.T @ weight)}
        bias = getattr(module.get_submodule(site.name), "bias", None)
        if space == "output" and bias is not None:
            new[f"{site.name}.bias"] = bias.detach().double() + x.T @ bias.detach().double()
        if site.is_transposed:
            new[name] = new[name].T
    return new, left


def collect_moments(
    streams: Streams, layer: int, site: Site, space: Space, context: Context, *, goes_on: bool = True
) -> tuple[Moments | ChannelMoments, Drift]:
    """Run the layer once more in the pruned stream and sum what the ridge problem needs: `ChannelMoments` for a norm.

    `goes_on`: what leaves the layer may be kept, because a correction of this layer, or of another, is to be used from now on.
    Raises `NoSiteError` where the site's gain is not as it was found, `CapacityError` where the sums do not fit into memory.
    """
    import torch

    from .ridge import ChannelMoments, Moments, check_room
    from .streams import Drift, run_to_site

    if site.norm and space == "output":
        raise NoSiteError(f"{site.name} of layer {layer} writes through a norm, which a correction in output space does not reach")
    position = streams.graph.layers.index(layer)
    pruned = streams.pruned
    pruned.run_up_to(layer)
    hidden = pruned.boundary(position, 0)
    size, width = (site.inputs if space == "input" else hidden.shape[-1]), hidden.shape[-1]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=hidden.device)

    moments: Moments | ChannelMoments
    if site.role == "norm":
        moments = ChannelMoments(zeros(4, width))
    else:
        with streams.group.agreeing(CapacityError):
            check_room(size, width, context.memory, context.device)
        moments = Moments(zeros(size, size), zeros(size, width), 0.0)
    drift = Drift()
    if site.role == "attention":
        with pruned.model.layer(layer):
            capture, equations = _equations_at(streams, layer, site, space, leave=True)
            for visit, taken in run_to_site(pruned, layer, capture):
                entered, target = visit.input[visit.mask].double(), streams.target_before(layer, visit)
                moments.add(*equations(taken, visit.mask, target - entered))
                drift.add(entered, target)
    else:
        keeps = goes_on and can_add_change(streams, site, space) and pruned.taken.has_room(site.inputs, width, pruned.model.dtype)
        with pruned.look(layer, keep=keeps) as step:
            streams.check_gain(layer, site)
            capture, equations = _equations_at(streams, layer, site, space)
            with capture as captured:
                for visit in step:
                    drifted = visit.output[visit.mask].double()
                    target = streams.target(position, visit.batch)[visit.mask].double()
                    taken = captured.pop()
                    moments.add(*equations(taken, visit.mask, target - drifted))
                    drift.add(drifted, target)
                    if keeps:
                        pruned.taken.keep(visit.batch, taken.reshape(*visit.mask.shape, -1))
    streams.join(drift, layer)
    moments.join(streams.group)
    return moments, drift


def _equations_at(
    streams: Streams, layer: int, site: Site, space: Space, *, leave: bool = False
) -> tuple[AbstractContextManager[list[Any]], Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """Return a capture at a site, and a function of what it captures, a mask (B, T) and what is missing (n, D).

    The function gives the inputs (n, F) and residuals (n, D) of the ridge problem. `leave`: as in `capture_site`.
    The layer's weights must be in.
    """
    from .behind_norms import capture_behind_norm, make_equations, scale_behind
    from .streams import capture_site

    model = streams.pruned.model
    if site.norm:
        with model.layer(layer) as module:
            scale = scale_behind(module, site)
        return capture_behind_norm(model, layer, site, leave=leave), partial(make_equations, scale=scale)

    def take(captured: torch.Tensor, mask: torch.Tensor, missing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return captured.reshape(*mask.shape, -1)[mask], missing

    return capture_site(model, layer, site, space, leave=leave), take
