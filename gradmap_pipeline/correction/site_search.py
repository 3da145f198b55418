"""Try a layer with changes, to find where it takes a correction of the residual stream exactly, and by what number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..sweep.layer_arguments import LayerArguments
from ..sweep.layerwise import LayerwiseModel
from .sites import NoSiteError, NotFiniteError, Site

if TYPE_CHECKING:
    import torch
    from torch import nn

_NARROWEST = 4  # a map with fewer inputs than a quarter of the hidden size is an adapter, not a projection


def find_sites(model: LayerwiseModel, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> tuple[Site, ...]:
    """The sites of base layer `index`, in the order in which they write. `hidden` is (B, T, D); the layer's weights must be in.

    Of those that write to the layer's output, the widest linear map, the last of equals, else the last norm, after the linear map
    that writes through it, if any; before them the linear map that writes to the residual stream ahead of the feed-forward part,
    if any, through a norm or not. Raises `NoSiteError` where none does.
    """
    import torch

    search = Search(model, index, hidden, arguments)
    with torch.no_grad():
        linear = [site for site in search.linear_maps() if site.inputs * _NARROWEST >= hidden.shape[-1]]
        linear.sort(key=lambda site: site.inputs)  # stable: the last called of the widest comes last
        norms = [*reversed(search.norms())]
        sites: list[Site] = []
        for site in [*reversed(linear), *norms]:
            gain = search.measure_gain_inside(site)
            before = search.find_map_before(site, linear) if gain and site.role == "norm" else site
            if gain and before is not None:
                sites.append(replace(before, role="attention", gain=gain))
                break
        for site in [*reversed(linear), *norms]:
            gain = search.measure_gain(site)
            if gain:
                before = search.find_map_before(site, linear) if site.role == "norm" else None
                sites += [] if before is None else [replace(before, gain=gain)]
                sites.append(replace(site, gain=gain))
                break
    if sites:
        return tuple(sites)
    raise NoSiteError(
        f"layer {index} of {type(model.module).__name__} has no linear map and no norm that writes to the residual stream "
        "unchanged; a correction cannot be folded into it"
    )


def check_gain(model: LayerwiseModel, index: int, hidden: torch.Tensor, arguments: LayerArguments, site: Site) -> None:
    """Raise `NoSiteError` where the gain of base layer `index`, with its own weights, is not that of the structure."""
    import torch

    if site.role != "attention":
        with torch.no_grad():
            measured = Search(model, index, hidden, arguments).estimate_gain(site)
        if not math.isfinite(measured):
            raise NotFiniteError(f"what leaves layer {index}")
        if not abs(measured / site.gain - 1) <= 0.05:
            raise NoSiteError(f"layer {index} scales what {site.writer} adds by a weight; a correction cannot be folded into it")


class Search:
    """A layer that is run with changes, to see what reaches its output."""

    def __init__(self, model: LayerwiseModel, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> None:
        import torch

        self.model, self.index, self.hidden, self.arguments = model, index, hidden, arguments
        self.layer = model.module.get_submodule(f"{model.layers_path}.{index}")
        with torch.no_grad():
            self.plain = self.run()
        nudge = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(self.plain)
        self.nudge = nudge * self.plain.float().square().mean().sqrt().to(nudge)  # of the stream's usual size, not of its peaks
        self.tolerance = (32 if hidden.dtype == torch.float32 else 8) * torch.finfo(hidden.dtype).eps

    def run(self) -> torch.Tensor:
        """The layer's output as it is now, (B, T, D)."""
        return self.model.run_layer(self.index, self.hidden, self.arguments)

    def linear_maps(self) -> list[Site]:
        """Linear maps to the hidden size that are called exactly once for every token, in the order of the calls."""
        from ..checkpoint.adapter import is_transposed, linear_classes

        maps = []
        for name in self._called_once(linear_classes()):
            transposed = is_transposed(self.layer.get_submodule(name))
            weight = self.layer.get_parameter(f"{name}.weight")
            if weight.ndim == 2:
                has_bias = self.layer.get_submodule(name).bias is not None
                maps.append(Site(name, "output", weight.shape[0 if transposed else 1], transposed, has_bias=has_bias))
        return maps

    def norms(self) -> list[Site]:
        """Modules whose parameters are one scale, and perhaps one shift, of each channel."""
        from torch import nn

        width = self.hidden.shape[-1]
        sites = []
        for name in self._called_once((nn.Module,)):
            parameters = dict(self.layer.get_submodule(name).named_parameters())
            if {"weight"} <= parameters.keys() <= {"weight", "bias"} and all(p.shape == (width,) for p in parameters.values()):
                sites.append(Site(name, "norm", width, has_bias="bias" in parameters))
        return sites

    def measure_gain(self, site: Site) -> float:
        """The number times which a vector added to what a module returns reaches the layer's output; 0 if none does."""
        moved = self._move(site)
        return self._factor(moved, self.nudge.expand_as(moved), self.plain)

    def estimate_gain(self, site: Site) -> float:
        """That number where there is one, whatever rounding makes of it."""
        size = self.nudge.double().norm()
        unit = (self.nudge.double() / size).to(self.nudge)  # whose products fit into half precision
        along = (self._move(site) @ unit).double()  # (B, T), summed up without a copy in more digits
        return float(along.mean() / size)

    def _move(self, site: Site) -> torch.Tensor:
        written = self.layer.get_submodule(site.writer)
        with _hooked(written.register_forward_hook(lambda _module, _input, output: output + self.nudge)):
            return self.run() - self.plain

    def find_map_before(self, norm: Site, maps: Sequence[Site]) -> Site | None:
        """The linear map whose output alone a norm takes, as a site that writes through it; None where there is none."""
        import torch

        returned: dict[str, torch.Tensor] = {}
        taken: list[torch.Tensor] = []
        handles = [
            self.layer.get_submodule(one.name).register_forward_hook(
                lambda _module, _input, output, name=one.name: returned.__setitem__(name, output)
            )
            for one in maps
        ]
        written = self.layer.get_submodule(norm.name)
        with _hooked(written.register_forward_pre_hook(lambda _module, inputs: taken.append(inputs[0])), *handles):
            self.run()
        before = next((one for one in maps if torch.equal(returned[one.name].reshape(taken[0].shape), taken[0])), None)
        offset = None if before is None else self.find_offset(norm.name)
        return None if before is None or offset is None else replace(before, norm=norm.name, norm_offset=offset)

    def find_offset(self, name: str) -> float | None:
        """The number that a norm adds to its weight: with the weight at minus that number nothing is written but the bias.

        None where it is neither 0 nor 1.
        """
        module = self.layer.get_submodule(name)
        weight = module.get_parameter("weight")
        before, biases = weight.data, [p.data for key, p in module.named_parameters() if key == "bias"]
        outputs: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda _module, _input, output: outputs.append(output))
        try:
            for offset in (0.0, 1.0):
                weight.data = before.new_full(before.shape, -offset)
                outputs.clear()
                self.run()
                if bool((outputs[0] - (biases[0] if biases else 0) == 0).all()):
                    return offset
        finally:
            handle.remove()
            weight.data = before
        return None

    def measure_gain_inside(self, site: Site, *, flattened: bool = False) -> float:
        """The number times which a module's output, added to the layer's input, is what a later module takes; 0 if none does.

        `flattened`: a module that takes all tokens in a row, as in OPT, counts too.
        """
        import torch

        returned: list[torch.Tensor] = []
        gains: list[float] = []

        def keep(_module: Any, _input: Any, output: torch.Tensor) -> None:
            returned.append(output.reshape(self.hidden.shape))

        def compare(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            taken = next((value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor)), None)
            if flattened and taken is not None and taken.shape == self.hidden.flatten(0, -2).shape:
                taken = taken.view_as(self.hidden)
            if returned and taken is not None and taken.shape == self.hidden.shape and taken.dtype == self.hidden.dtype:
                gains.append(self._factor(taken - self.hidden, returned[0], taken))

        own = {id(module) for module in self.layer.get_submodule(site.name).modules()}
        others = [module for module in self.layer.modules() if id(module) not in own and module is not self.layer]
        handles = [module.register_forward_pre_hook(compare, with_kwargs=True) for module in others]
        with _hooked(self.layer.get_submodule(site.name).register_forward_hook(keep), *handles):
            self.run()
        return next(filter(None, gains), 0.0)

    def _factor(self, moved: torch.Tensor, vector: torch.Tensor, stream: torch.Tensor) -> float:
        """The factor between two tensors, 0 if there is none. What rounding may do to an element goes by its size in the stream."""
        wide, other = moved.double(), vector.double()
        factor = float((wide * other).sum() / other.square().sum().clamp_min(1e-300))
        size = stream.double().abs() + self.hidden.double().abs() + wide.abs()
        if abs(factor) < 1e-3 or not bool(((wide - factor * other).abs() <= self.tolerance * size).all()):
            return 0.0
        return 1.0 if abs(factor - 1) < 1e-4 else factor

    def _called_once(self, kinds: tuple[type[nn.Module], ...]) -> list[str]:
        import torch

        called: list[str] = []
        handles = []
        for name, module in self.layer.named_modules():
            if name and isinstance(module, kinds):

                def listen(_module: nn.Module, _input: object, output: object, name: str = name) -> None:
                    hidden = self.hidden
                    if isinstance(output, torch.Tensor) and (output.numel(), output.shape[-1]) == (
                        hidden.numel(),
                        hidden.shape[-1],
                    ):
                        called.append(name)

                handles.append(module.register_forward_hook(listen))
        with _hooked(*handles):
            self.run()
        return [name for name in called if called.count(name) == 1]


@contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
