"""New values of a layer's parameters: written as patches of the checkpoint, and used by the pruned stream from then on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..artifacts import TensorFile
from ..checkpoint.casts import FOR_WRITING, cast_all
from ..checkpoint.checkpoint import read_header
from ..errors import StageError

if TYPE_CHECKING:
    import torch

    from ..checkpoint.checkpoint import StoredTensor
    from ..context import Context
    from .sites import Site
    from .streams import Streams


def write_patches(
    streams: Streams, layer: int, new: Mapping[str, torch.Tensor], context: Context, site: Site | None = None
) -> dict[str, TensorFile]:
    """Write new values of a layer's parameters, in the type of the checkpoint, and use them in the pruned stream from now on.

    `new`: by the parameter's name inside the layer. `site`: whose weight alone is new; where the pass has kept what the site took,
    the layer is not run again. Returns the files by the tensor's name in the checkpoint. Raises `StageError` where a value is not
    finite, or does not fit into the type.
    """
    import torch

    patches, values, lies = {}, {}, {}
    with streams.pruned.model.layer(layer):  # its values are in before a file changes that they lie in
        for parameter, value in new.items():
            name = streams.pruned.model.disk_name(layer, parameter)
            stored = streams.graph.stored_tensor(name)
            exported: torch.dtype = getattr(torch, streams.graph.dtype or stored.torch_dtype)
            with streams.group.agreeing(StageError):
                if not value.isfinite().all():
                    raise StageError(f"the correction of {name!r} is not finite, computed in {context.dtype}; raise 'ridge'")
                cast = cast_all(value, exported, name, FOR_WRITING).contiguous()
            values[parameter] = streams.group.lead(cast).cpu()
            patches[name] = TensorFile.save({name: values[parameter]}, context.folder / f"{name}.safetensors")
            lies[parameter] = read_header(patches[name].path)[name]
        use_values(streams, layer, values, site, lies)
    return patches


def use_values(
    streams: Streams, layer: int, new: Mapping[str, torch.Tensor], site: Site | None, lies: Mapping[str, StoredTensor]
) -> None:
    """Use new values of a layer's parameters in the pruned stream from now on. `site`: as in `write_patches`.

    `lies`: where those values are that have a file.
    """
    pruned = streams.pruned
    name = f"{site.name}.weight" if site else ""
    with pruned.model.layer(layer) as module:
        keeps_taken = site is not None and bool(pruned.taken) and set(new) == {name}
        before = module.get_parameter(name).detach().clone() if keeps_taken else None
        for parameter, value in new.items():
            pruned.model.weights.override(layer, parameter, value, lies.get(parameter))
        change = None if before is None else module.get_parameter(name).detach() - before
    if change is None or site is None:
        pruned.invalidate_from(layer)
    else:
        pruned.change_output(layer, change if site.is_transposed else change.T)
