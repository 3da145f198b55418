"""Bring weights into the modules of a model on the meta device, and take them out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ..checkpoint import adapter
from ..checkpoint.casts import FOR_COMPUTING, cast_all
from ..checkpoint.graph import ModelGraph
from ..checkpoint.loading import hold, load_checked
from ..errors import ModelError
from ..machine.accelerators import is_accelerator
from .ledger import Ledger
from .overrides import Overrides
from .prefetch import Prefetcher
from .refusals import refuse
from .vocabulary import VocabularyTensor, find_vocabulary
from .weight_sources import WeightSource, ZeroWeights

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from ..checkpoint.checkpoint import StoredTensor

RESIDENT_BYTES = 1 << 30
"""Layers stay in memory after their first use while all of them together take no more than this."""


class WeightLoader:
    """Layers, embeddings and head are brought in when they are used, all else at once."""

    def __init__(
        self,
        graph: ModelGraph,
        module: PreTrainedModel,
        layers_path: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        resident_bytes: int,
        source: WeightSource,
    ) -> None:
        """`module`: on the meta device. `layers_path`: the name in it of the list of layers."""
        self.ledger = Ledger()
        self._graph = graph
        self._module = module
        self._layers_path = layers_path
        self._layers: list[nn.Module] = list(module.get_submodule(layers_path).children())
        self._dtype = dtype
        self._device = device
        self._source = source
        self.overrides = Overrides()
        self._open: Counter[int] = Counter()
        """By layer: the `with` blocks that are in it."""
        self.is_resident = sum(graph.layer_elements().values()) * dtype.itemsize <= resident_bytes
        """Whether layers stay in memory after their first use."""
        self.reads_ahead = False
        """Whether to read the layer that is expected next while another computes."""
        self._prefetcher = Prefetcher(device)
        self.vocabulary = find_vocabulary(module, graph.other_tensors())
        self._bring_in_rest()

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Base layer `index` with its weights, for the time of the `with` block, or of the outermost of several."""
        layer = self._layers[index]
        if _lacks_weights(layer):
            self._bring_in(index)
            self._check_complete(layer, f"{self._layers_path}.{index}.")
            self._source.finish(layer)
            for name, value in self.overrides.read(index):
                layer.get_parameter(name).data.copy_(value)
        self._open[index] += 1
        try:
            yield layer
        except BaseException:
            self._prefetcher.drop()  # the sweep ends here, and nobody comes for it
            raise
        finally:
            self._open[index] -= 1
            if not self.is_resident and not self._open[index]:
                self.drop(index)

    @contextmanager
    def unread_layer(self, index: int) -> Iterator[nn.Module]:
        """Base layer `index` with zeros unless its weights are in, for what depends on no weight: nothing is read."""
        layer = self._layers[index]
        if not _lacks_weights(layer):
            yield layer
            return
        source, self._source = self._source, ZeroWeights()
        try:
            self._bring_in(index)
            self._check_complete(layer, f"{self._layers_path}.{index}.")
            yield layer
        finally:
            self._source = source
            self.drop(index)

    def embeddings(self) -> AbstractContextManager[None]:
        """The embeddings of tokens are there for the time of the `with` block."""
        return self._present(self.vocabulary.embeddings)

    def head(self) -> AbstractContextManager[None]:
        """The head is there for the time of the `with` block."""
        return self._present(self.vocabulary.head)

    @contextmanager
    def _present(self, tensor: VocabularyTensor | None) -> Iterator[None]:
        if tensor is None:
            yield
            return
        if tensor.weight.is_meta:
            self._load(self._reads(tensor.stored))
            self.ledger.add("embeddings and head", tensor.weight.nbytes)
            for module in tensor.modules:
                module.weight = tensor.weight
            tensor.weight.requires_grad_(False)
        tensor.users += 1
        try:
            yield
        finally:
            tensor.users -= 1
            if not tensor.users and not self.is_resident:
                self._drop_vocabulary(tensor)

    def _drop_vocabulary(self, tensor: VocabularyTensor) -> None:
        if not tensor.weight.is_meta:
            self.ledger.add("embeddings and head", -tensor.weight.nbytes)
            for module in tensor.modules:
                _drop_weight(module, "weight")

    def drop(self, index: int) -> None:
        """Put the weights of base layer `index` back on the meta device."""
        self.ledger.add("layer weights", -_bytes_of(self._layers[index]))
        drop_weights(self._layers[index])

    def reload(self, index: int) -> None:
        """Read base layer `index` again, whose weights somebody has changed in place."""
        self.drop(index)
        with self.layer(index):
            pass

    def expect(self, index: int) -> None:
        """Base layer `index` is the next to be used."""
        if self.reads_ahead and _lacks_weights(self._layers[index]):
            self._prefetcher.start(index, partial(self._read_all, index, pinned=is_accelerator(str(self._device))))

    def forget_rest(self) -> None:
        """Drop embeddings, norm and head; from now on layers alone can be run."""
        for tensor in self.vocabulary.tensors:
            self._drop_vocabulary(tensor)
        inside = {id(module) for layer in self._layers for module in layer.modules()}
        for module in self._module.modules():
            if id(module) not in inside:
                _drop_own_weights(module)

    def override(self, index: int, parameter: str, value: torch.Tensor, stored: StoredTensor | None = None) -> None:
        """Use another value for a parameter of base layer `index`, from now on. `stored`: where it lies in a file, if it does."""
        current = self._layers[index].get_parameter(parameter)
        value = cast_all(value, current.dtype, f"{self._layers_path}.{index}.{parameter}", FOR_COMPUTING)
        self.overrides.put(index, parameter, stored or value)
        if not current.is_meta:
            current.data.copy_(value)

    def restore(self, index: int) -> None:
        """Use the values of the checkpoint again for base layer `index`, from its next use on. It must not be in use."""
        if self.overrides.has(index):
            self.overrides.forget(index)
            self._drop_unused(index)

    @contextmanager
    def set_aside(self, index: int, prefix: str) -> Iterator[None]:
        """For the time of the `with` block, the checkpoint's values of parameters of base layer `index` that are named so.

        What is overridden there meanwhile is forgotten at its end. The layer must not be in use when it begins and ends.
        """
        try:
            with self.overrides.set_aside(index, prefix) as was_overridden:
                if was_overridden:
                    self._drop_unused(index)
                yield
        finally:
            self._drop_unused(index)

    def _drop_unused(self, index: int) -> None:
        if not _lacks_weights(self._layers[index]):
            self.drop(index)

    def try_load(self, tensors: Mapping[str, StoredTensor]) -> adapter.Loading:
        """Load tensors as the weights of a layer are loaded, and say what became of them."""
        return self._load(self._reads(tensors))

    def _bring_in_rest(self) -> None:
        """Load what belongs to no layer, besides embeddings and head; tie what is tied."""
        later = {name for tensor in self.vocabulary.tensors for name in tensor.stored}
        others = {name: stored for name, stored in self._graph.other_tensors().items() if name not in later}
        missing = self._load(self._reads(others)).missing - {tensor.name for tensor in self.vocabulary.tensors}
        adapter.tie_weights(self._module, missing)
        layers = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        for name, parameter in self._module.named_parameters():
            if id(parameter) not in layers and parameter.is_meta and not self.vocabulary.has(parameter):
                raise ModelError(f"{str(self._graph.base.folder)!r} lacks the weights of {name!r}")
            parameter.requires_grad_(False)

    def _bring_in(self, index: int) -> None:
        """Load a layer: what was read ahead, else each tensor when it is wanted."""
        ahead = self._prefetcher.take(index)
        self._load(self._reads(self._graph.layer_tensors(index)) if ahead is None else hold(ahead))
        self.ledger.add("layer weights", _bytes_of(self._layers[index]))

    def _load(self, reads: Mapping[str, Callable[[], torch.Tensor]]) -> adapter.Loading:
        return load_checked(self._module, reads, self._dtype, str(self._device))

    def _reads(self, tensors: Mapping[str, StoredTensor], *, pinned: bool = False) -> dict[str, Callable[[], torch.Tensor]]:
        """How each tensor is read, in the type to compute in unless the architecture has types of its own."""
        cast = None if adapter.has_types_of_its_own(self._module, self._dtype) else self._dtype
        return {name: partial(self._source.read, tensor, cast, pinned=pinned) for name, tensor in tensors.items()}

    def _read_all(self, index: int, *, pinned: bool = False) -> dict[str, torch.Tensor]:
        return {name: read() for name, read in self._reads(self._graph.layer_tensors(index), pinned=pinned).items()}

    def _check_complete(self, layer: nn.Module, prefix: str) -> None:
        for name, parameter in layer.named_parameters():
            if parameter.is_meta:
                if adapter.is_tied(self._module, prefix + name):
                    raise refuse(self._module, f"{prefix + name!r} is shared with another layer")
                raise ModelError(f"{str(self._graph.base.folder)!r} lacks the weights of {prefix + name!r}")
            parameter.requires_grad_(False)


def drop_weights(layer: nn.Module) -> None:
    """Put the weights of a module back on the meta device."""
    for module in layer.modules():
        _drop_own_weights(module)


def _drop_own_weights(module: nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            _drop_weight(module, name)


def _drop_weight(module: nn.Module, name: str) -> None:
    import torch
    from torch import nn

    empty = torch.empty_like(module._parameters[name], device="meta")  # type: ignore[arg-type]
    module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _bytes_of(layer: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters() if not parameter.is_meta)


def _lacks_weights(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())
