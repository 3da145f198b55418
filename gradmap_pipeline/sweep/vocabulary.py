"""The embeddings of tokens and the head over them, by far the largest tensors that no layer has: found without reading them.

Sizes: V vocabulary, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..checkpoint import adapter
from ..errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from ..checkpoint.checkpoint import StoredTensor


@dataclass
class VocabularyTensor:
    """A tensor (V, D) that is brought in when it is used."""

    name: str
    """Of the parameter in the model."""
    modules: list[nn.Module]
    """Those that have it as their `weight`; two where the head is tied to the embeddings."""
    stored: dict[str, StoredTensor]
    """It alone, by its name on disk."""
    users: int = field(default=0)
    """How many need it now."""

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.modules[0].weight  # type: ignore[assignment]
        return weight

    @property
    def stored_bytes(self) -> int:
        """On disk."""
        return sum(tensor.size for tensor in self.stored.values())


@dataclass
class Vocabulary:
    """Where a model's embeddings and head are; None for one that is no such tensor, which stays in memory."""

    embeddings: VocabularyTensor | None
    head: VocabularyTensor | None

    @property
    def tensors(self) -> list[VocabularyTensor]:
        """Each once."""
        found = [tensor for tensor in (self.embeddings, self.head) if tensor is not None]
        return found[:1] if self.head is self.embeddings else found

    def has(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is one of them."""
        return any(module.weight is parameter for tensor in self.tensors for module in tensor.modules)


def find_vocabulary(module: PreTrainedModel, others: Mapping[str, StoredTensor]) -> Vocabulary:
    """Embeddings and head of a model on the meta device. `others`: tensors on disk that belong to no layer.

    A head that is not on disk is the embeddings, where it is tied to them. Raises `ModelError` where a tensor has another shape.
    """
    embeddings, head = adapter.find_embeddings(module), adapter.find_head(module)
    if embeddings is None:
        return Vocabulary(None, None)
    names = {id(part): name for name, part in module.named_modules()}
    found = _find(module, embeddings, names, others)
    if head is None:
        return Vocabulary(found, None)
    own = _find(module, head, names, others)
    if own is None and found is not None and adapter.is_tied(module, f"{names[id(head)]}.weight"):
        found.modules.append(head)
        own = found
    return Vocabulary(found, own)


def _find(
    module: PreTrainedModel, part: nn.Module, names: Mapping[int, str], others: Mapping[str, StoredTensor]
) -> VocabularyTensor | None:
    """The weight of a module under its own name on disk, or under the one that the decoder alone would have."""
    name = f"{names[id(part)]}.weight"
    start = adapter.prefix_on_disk(module)
    stored = {key: others[key] for key in (name, name.removeprefix(start)) if key in others and others[key].is_float}
    if len(stored) != 1:
        return None
    tensor = VocabularyTensor(name, [part], stored)
    (one,) = stored.values()
    if one.shape != tuple(tensor.weight.shape):
        raise ModelError(
            f"{one.name!r} has shape {one.shape} in the checkpoint, but its config requires {tuple(tensor.weight.shape)}"
        )
    return tensor
