"""A model that runs layer by layer with made-up weights: no tensor of the checkpoint is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import StoredTensor
from .layerwise import LayerwiseModel, drop_weights

if TYPE_CHECKING:
    import torch
    from torch import nn


class HollowModel(LayerwiseModel):
    """Every tensor is zero until `make_up` fills it."""

    thin = False
    """Whether a tensor is one zero, shown at every place, so that it takes no memory."""

    def read(self, stored: StoredTensor, cast: torch.dtype | None, *, pinned: bool = False) -> torch.Tensor:
        """Zeros; memory that nobody touches."""
        import torch

        dtype = (cast or getattr(torch, stored.torch_dtype)) if stored.is_float else torch.long  # an index, if no float
        return torch.zeros((), dtype=dtype).expand(stored.shape) if self.thin else torch.zeros(stored.shape, dtype=dtype)

    def zeros(self, tensors: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
        """What `read` gives for each."""
        return self._read_all(tensors)

    @contextmanager
    def emptied(self, index: int) -> Iterator[None]:
        """Base layer `index` has no weights before and after the `with` block."""
        layer = self.module.get_submodule(f"{self.layers_path}.{index}")
        drop_weights(layer)
        try:
            yield
        finally:
            drop_weights(layer)


class ThinModel(HollowModel):
    """A hollow model of no size, but for the layer that is in, which has made-up weights."""

    thin = True

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Base layer `index` with weights large enough that nothing it does is lost in rounding."""
        with super().layer(index) as module:
            make_up(module, 0.2)
            yield module


def make_up(module: nn.Module, width: float = 0.02) -> None:
    """Fill weights that are there with small numbers, different ones, so that experts are chosen evenly."""
    import torch

    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if name not in part._non_persistent_buffers_set and buffer.is_floating_point() and not buffer.is_meta:
                    part._buffers[name] = torch.ones_like(buffer)  # a number that scales an output: as if it did not
        for parameter in module.parameters():
            if not parameter.is_meta:
                if not parameter.is_contiguous():
                    parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                if parameter.device not in generators:
                    generators[parameter.device] = torch.Generator(parameter.device).manual_seed(0)
                parameter.uniform_(-width, width, generator=generators[parameter.device])
