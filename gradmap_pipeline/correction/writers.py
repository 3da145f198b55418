"""Find, by structure, which modules of a layer write to the residual stream, and divide what they write by a number.

Where every layer reads the stream through a norm, its size says nothing: a layer whose writers are divided by s does to h / s what
it did to h, and gives the old result over s. So a model whose layers above a cut have their writers divided by s is one
whose stream is multiplied by s at the cut, with embeddings and head as they are. This is exact but for the epsilon of the norms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .site_search import Search
from .sites import NoSiteError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from ..batches import Batch
    from ..machine.distributed import ProcessGroup
    from ..sweep.layer_arguments import LayerArguments
    from ..sweep.layerwise import LayerwiseModel

_HALF = 2.0  # the stream is divided by a power of two in tests, so that nothing is rounded
_TOLERANCE = 1e-3  # the epsilon of a norm makes 1e-5, a layer that sees the size of the stream makes 0.1


@dataclass(frozen=True)
class Writer:
    """A module whose output is added to the residual stream."""

    name: str
    """Inside its layer."""
    offset: float = 0.0
    """What the module adds to its weight before it multiplies by it: 1 in the norms of Gemma."""


def find_writers(model: LayerwiseModel, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> tuple[Writer, ...]:
    """The writers of base layer `index`. `hidden` is (B, T, D); the layer's weights must be in.

    Raises `NoSiteError` where dividing what linear maps and norms write is not the same as dividing the stream.
    """
    import torch

    search = Search(model, index, hidden, arguments)
    with torch.no_grad():
        sites = [*search.linear_maps(), *search.norms()]
        found = [site for site in sites if search.measure_gain(site) or search.measure_gain_inside(site, flattened=True)]
        writers = tuple(Writer(site.name, (search.find_offset(site.name) or 0.0) if site.role == "norm" else 0.0) for site in found)
        changed = divide_writers(search.layer, writers, _HALF)
        before = {name: search.layer.get_parameter(name).detach().clone() for name in changed}
        _set(search.layer, changed)
        try:
            divided = model.run_layer(index, hidden / _HALF, arguments) * _HALF
        finally:
            _set(search.layer, before)
    error = float((divided - search.plain).double().abs().max() / search.plain.double().abs().max().clamp_min(1e-300))
    if not writers or not error <= _TOLERANCE:
        raise NoSiteError(
            f"layer {index} of {type(model.module).__name__} depends on the size of the residual stream, or writes to it by other "
            "modules than linear maps and norms; the stream cannot be rescaled"
        )
    return writers


def check_head(model: LayerwiseModel, batch: Batch, hidden: torch.Tensor) -> None:
    """Raise `NoSiteError` unless what the head takes is the same where the stream that leaves the last layer is divided.

    `hidden`: (B, T, D), as it leaves the last layer. Parameters of one dimension that belong to no layer become ones; the weights
    of the head itself do not matter. The model must have been recorded.
    """
    import torch

    module = model.module
    head = module.get_output_embeddings()
    inside = {id(parameter) for index in model.graph.layers for parameter in model.parameters_of(index)}
    for parameter in module.parameters():
        if id(parameter) not in inside and parameter.ndim == 1 and not parameter.is_meta:
            parameter.data = torch.ones_like(parameter, memory_format=torch.contiguous_format)
    taken: list[torch.Tensor] = []
    if head is not None:

        def take(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            taken.append(inputs[0])
            return (inputs[0][:, :0],)  # no logits, for which the whole head would have to lie in memory

        handle = head.register_forward_pre_hook(take)
        try:
            with torch.no_grad():
                for size in (1.0, _HALF):
                    model.head(batch, hidden / size)
        finally:
            handle.remove()
    if len(taken) != 2 or not (taken[0] - taken[1]).abs().max() <= _TOLERANCE * taken[0].abs().max() > 0:
        raise NoSiteError(
            f"the head of {type(module).__name__} depends on the size of the residual stream; the stream cannot be rescaled"
        )


def divide_writers(layer: nn.Module, writers: Sequence[Writer], scale: float) -> dict[str, torch.Tensor]:
    """New values, fp64, of the parameters of a layer's writers, by name, so that they write what they did over `scale`."""
    new = {}
    for writer in writers:
        for name, parameter in layer.get_submodule(writer.name).named_parameters():
            offset = writer.offset if name == "weight" else 0.0
            new[f"{writer.name}.{name}"] = (parameter.detach().double() + offset) / scale - offset
    return new


def share_writers(writers_by_layer: Mapping[int, Sequence[Writer]], group: ProcessGroup) -> dict[int, tuple[Writer, ...]]:
    """The writers of layers as the leading process found them."""
    told = group.tell({str(layer): [asdict(writer) for writer in writers] for layer, writers in writers_by_layer.items()})
    return {int(layer): tuple(Writer(**writer) for writer in writers) for layer, writers in told.items()}


def _set(layer: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        layer.get_parameter(name).data.copy_(value)
