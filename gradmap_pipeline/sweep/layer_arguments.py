"""How an architecture calls its layers: with which arguments, and what it expects back."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

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
