"""How an architecture calls its layers: with which arguments, and what it expects back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .kept_tensors import ARGUMENTS, KeptTensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerArguments:
    """What the model passes to one layer besides the hidden states: masks, position embeddings, …"""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    @cached_property
    def containers(self) -> list[Any]:
        """Arguments that a layer could put something into."""
        return [value for value in (*self.positional, *self.named.values()) if isinstance(value, MutableMapping | list)]


@dataclass(frozen=True)
class _Place:
    """Where a tensor stood that is kept elsewhere."""

    number: int


@dataclass(frozen=True)
class PackedArguments:
    """What all layers are called with for one batch, with its tensors apart, each of them once."""

    layers: dict[int, LayerArguments]
    """What each layer is called with, with a place instead of each tensor."""
    shapes: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arguments: dict[int, LayerArguments]) -> tuple[PackedArguments, list[torch.Tensor]]:
        """Take tensors out, also those in tuples; what a layer could put something into stays as it is, and so do views of more."""
        tensors: dict[int, torch.Tensor] = {}
        numbers: dict[int, int] = {}

        def pack(value: Any) -> Any:
            if isinstance(value, tuple) and type(value) is tuple:
                return tuple(map(pack, value))
            if not _is_whole(value):
                return value
            if id(value) not in numbers:
                numbers[id(value)] = len(tensors)
                tensors[numbers[id(value)]] = value
            return _Place(numbers[id(value)])

        layers = {
            layer: LayerArguments(pack(call.positional), {name: pack(value) for name, value in call.named.items()})
            for layer, call in arguments.items()
        }
        kept = list(tensors.values())
        return cls(layers, tuple((tensor.dtype, tuple(tensor.shape)) for tensor in kept)), kept

    def unpack(self, layer: int, read: Callable[[int], torch.Tensor]) -> LayerArguments:
        """What a base layer is called with. `read`: gives the tensor of a number."""

        def fill(value: Any) -> Any:
            if isinstance(value, tuple) and type(value) is tuple:
                return tuple(map(fill, value))
            return read(value.number) if isinstance(value, _Place) else value

        call = self.layers[layer]
        return LayerArguments(fill(call.positional), {name: fill(value) for name, value in call.named.items()})


class KeptArguments:
    """What the layers of each batch are called with, kept once for neighbouring batches for which it is the same."""

    def __init__(self, kept: KeptTensors) -> None:
        self._kept = kept
        self._batches: list[tuple[PackedArguments, int]] = []
        """By batch: the calls, and the batch whose tensors are those of this one, too."""

    def add(self, batch: int, arguments: dict[int, LayerArguments]) -> None:
        """Keep the calls of the next batch."""
        packed, tensors = PackedArguments.of(arguments)
        if self._batches:
            before, owner = self._batches[-1]
            if before.shapes == packed.shapes and all(
                tensor.equal(self._kept.get(ARGUMENTS + number, owner)) for number, tensor in enumerate(tensors)
            ):
                self._batches.append((packed, owner))
                return
        for number, tensor in enumerate(tensors):
            self._kept.put(ARGUMENTS + number, batch, tensor)
        self._batches.append((packed, batch))

    def get(self, batch: int, layer: int) -> LayerArguments:
        """What a base layer is called with for a batch."""
        packed, owner = self._batches[batch]
        return packed.unpack(layer, lambda number: self._kept.get(ARGUMENTS + number, owner))


def count_bytes(arguments: Iterable[LayerArguments]) -> int:
    """Bytes of all tensors in calls, memory that several share once."""
    sizes: dict[int, int] = {}
    for call in arguments:
        for tensor in _tensors_in([*call.positional, *call.named.values()]):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _is_whole(value: Any) -> bool:
    """Whether a value is a tensor with memory of its own size."""
    import torch

    return isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() == value.nbytes


@dataclass(frozen=True)
class OutputShape:
    """What a layer returns: hidden states alone, or first in a tuple or list."""

    container: type | None
    others: tuple[Any, ...]
    """Further elements: attention weights, states."""

    @classmethod
    def of(cls, output: Any) -> OutputShape:
        """Learn from an output."""
        return cls(type(output), tuple(output[1:])) if isinstance(output, tuple | list) else cls(None, ())

    def wrap(self, hidden: torch.Tensor) -> Any:
        """Such an output with these hidden states."""
        return hidden if self.container is None else self.container([hidden, *self.others])

    def hands_on(self, arguments: LayerArguments) -> bool:
        """Whether one of the further elements is among the arguments of a layer."""
        others = {id(part) for part in _tensors_in(self.others)}
        return any(id(part) in others for part in _tensors_in([*arguments.positional, *arguments.named.values()]))


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a layer returned."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _tensors_in(value: Any) -> list[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, MutableMapping) else value if isinstance(value, list | tuple) else ()
    return [part for item in items for part in _tensors_in(item)]
