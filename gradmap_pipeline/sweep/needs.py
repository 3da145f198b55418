"""What a sweep over some samples would need: sizes from file headers, and what autograd saves from one sample in one layer.

Everything is in bytes of resident memory. Sizes: T tokens a sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..batches import Batch
from ..machine.accelerators import is_accelerator
from ..machine.memory import free_bytes
from .head_losses import LOGIT_BYTES, LOGITS_AT_ONCE

if TYPE_CHECKING:
    import torch

    from .layer_arguments import LayerArguments
    from .layerwise import LayerwiseModel

BOUNDARIES_GOING_UP = 4
"""Kept at a time of two models that go up side by side: what enters and leaves a layer of each."""
_WORK = 1.5
"""Working memory of a layer over what autograd saves of it: gradients on their way down."""


@dataclass(frozen=True)
class SweepNeeds:
    """What a sweep over some samples would take."""

    samples: int
    tokens: int
    """Tokens in a sample."""
    layers: int
    layer_bytes: int
    """Bytes of the largest layer."""
    all_layer_bytes: int
    stored_bytes: int
    """Bytes of all layers on disk."""
    boundary_bytes: int
    """Bytes of one sample at one boundary."""
    saved_bytes: int
    """What autograd saves of one sample in one layer."""
    words: int
    """V"""
    logits_at_once: int
    """Logits that the head holds at once, unless one position of a batch has more."""
    item_bytes: int = 4
    """Bytes of a number in the type that is computed in."""
    layer_elements: int = 0
    """Parameters of the largest layer."""
    largest_parameter: int = 0
    """Elements of a layer's largest parameter."""
    largest_tensor_bytes: int = 0
    """Bytes of the largest tensor of a layer, as it is stored and as it is computed with: what loading holds besides the layer."""
    embedding_bytes: int = 0
    head_bytes: int = 0
    vocabulary_bytes: int = 0
    """Bytes of both at a time; as many as of one where the head is tied to the embeddings."""
    stored_embedding_bytes: int = 0
    stored_head_bytes: int = 0
    argument_bytes: int = 0
    """What a layer is called with besides hidden states, of one sample."""
    fixed_argument_bytes: int = 0
    """The same, of a batch of any size."""
    has_padding: bool = False
    """Whether samples have padding, so that each batch is called with masks of its own."""
    is_backward: bool = True
    has_weight_gradients: bool = False
    keeps_boundaries: bool = True
    """All of them, not just those at the layer that it stands at."""
    boundaries: int = 1
    """How many are kept at a time, where not all are."""
    uses_layers_once: bool = False
    """Whether a layer that was left is not entered again, so that none need stay in memory."""
    has_head: bool = True
    """Whether logits are computed."""
    has_slow_reads: bool = True
    """Whether reading waits for a disk or a bus; out of the system's cache it takes the processor from computing."""

    def count_logit_bytes(self, batch: int) -> int:
        """Bytes of the logits of a batch that are held at once."""
        if not self.has_head:
            return 0
        positions = max(1, min(self.tokens, self.logits_at_once // (batch * self.words)))
        return LOGIT_BYTES * batch * positions * self.words

    def count_work(self, batch: int) -> int:
        """What one layer computes of a batch, what goes in and what comes out."""
        saved = math.ceil(self.saved_bytes * _WORK) if self.is_backward else self.saved_bytes
        return batch * (saved + (3 if self.is_backward else 2) * self.boundary_bytes)

    def count_own_arguments(self, batch: int) -> int:
        """What a layer is called with, of each sample, where every batch has masks of its own."""
        return self.argument_bytes + math.ceil(self.fixed_argument_bytes / batch) if self.has_padding else 0

    @property
    def weight_gradient_bytes(self) -> int:
        """Sums in fp32 of a layer's gradients, one batch's in the computed type, and what is made of the largest in fp64."""
        return 4 * self.layer_elements + self.layer_bytes + 24 * self.largest_parameter if self.has_weight_gradients else 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of one sample between layers: hidden states at the boundaries, and a gradient or a stream without a layer."""
        return self.boundary_bytes * (self.layers + 2 if self.keeps_boundaries else self.boundaries)

    def going_up(self) -> SweepNeeds:
        """The same of two models that go up side by side, layer by layer, and keep what enters and leaves the layer of either.

        In fp32 what a map took may be kept besides, where there is room: up to four times as wide as a boundary.
        """
        taken = 4 if self.item_bytes == 4 else 0
        return replace(self, keeps_boundaries=False, boundaries=BOUNDARIES_GOING_UP + taken, uses_layers_once=True)


def measure_needs(
    model: LayerwiseModel,
    samples: int,
    tokens: int,
    *,
    is_backward: bool = True,
    has_weight_gradients: bool = False,
    keeps_boundaries: bool = True,
    has_padding: bool = False,
    has_head: bool = True,
) -> SweepNeeds:
    """Needs of a model that is about to be swept; runs one sample through one layer to see what autograd saves."""
    from ..checkpoint.adapter import count_conversion_copies
    from .layer_arguments import count_bytes

    graph, size = model.graph, model.dtype.itemsize
    elements = graph.layer_elements()
    largest = max(elements, key=elements.__getitem__)
    is_padded = has_padding and not model.lengths_apart
    hidden, arguments = model.record(make_batch(1, tokens, has_padding=is_padded), is_made_up=True)
    one = count_bytes(arguments.values())
    more = model.record(make_batch(2, tokens, has_padding=is_padded), is_made_up=True)[1]
    each = max(0, count_bytes(more.values()) - one)
    del more
    vocabulary = model.weights.vocabulary
    embeddings, head = vocabulary.embeddings, vocabulary.head
    tensors = [tensor for layer in graph.layers for tensor in graph.layer_tensors(layer).values()]
    one_by_one = max(tensor.size + tensor.elements * size for tensor in tensors)
    needs = SweepNeeds(
        samples=samples,
        tokens=tokens,
        layers=len(graph.layers),
        layer_bytes=elements[largest] * size,
        all_layer_bytes=sum(elements.values()) * size,
        stored_bytes=sum(tensor.size for tensor in tensors),
        boundary_bytes=hidden.nbytes,
        saved_bytes=_measure_saved(model, largest, hidden, arguments[largest]),
        words=model.words,
        item_bytes=size,
        logits_at_once=LOGITS_AT_ONCE if model.can_slice_logits else tokens * model.words * samples,
        layer_elements=elements[largest],
        largest_parameter=max(parameter.numel() for parameter in model.parameters_of(largest)),
        largest_tensor_bytes=max(one_by_one, elements[largest] * size * count_conversion_copies(model.module)),
        embedding_bytes=embeddings.weight.nbytes if embeddings else 0,
        head_bytes=head.weight.nbytes if head else 0,
        vocabulary_bytes=sum(tensor.weight.nbytes for tensor in vocabulary.tensors),
        stored_embedding_bytes=embeddings.stored_bytes if embeddings else 0,
        stored_head_bytes=head.stored_bytes if head else 0,
        argument_bytes=each,
        fixed_argument_bytes=max(0, one - each),
        has_padding=has_padding,
        is_backward=is_backward,
        has_weight_gradients=has_weight_gradients,
        keeps_boundaries=keeps_boundaries,
        has_head=has_head,
    )
    return replace(needs, has_slow_reads=is_accelerator(str(model.device)) or needs.stored_bytes > free_bytes())


def make_batch(samples: int, tokens: int, *, has_padding: bool = False) -> Batch:
    """A batch of equal tokens, the last of each sample a padding where `has_padding`."""
    import torch

    mask = torch.ones(samples, tokens, dtype=torch.bool)
    mask[:, tokens - 1] = not (has_padding and tokens > 1)
    return Batch(torch.zeros(samples, tokens, dtype=torch.long), mask)


def _measure_saved(model: LayerwiseModel, layer: int, hidden: torch.Tensor, arguments: LayerArguments) -> int:
    """Bytes that autograd keeps for one layer besides its weights, each storage once, and what comes out of it."""
    import torch

    with model.weights.unread_layer(layer) as module:
        with torch.enable_grad(), noting_saved() as saved:
            output = model.run_layer(layer, hidden.detach().requires_grad_(), arguments)
        return sum_saved(saved, module.parameters()) + output.nbytes


@contextmanager
def noting_saved() -> Iterator[dict[int, int]]:
    """Sizes in bytes of the storages that autograd keeps meanwhile, by their places in memory."""
    import torch

    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that holds its own output is never freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def sum_saved(saved: Mapping[int, int], besides: Iterable[torch.Tensor]) -> int:
    """Bytes of what `noting_saved` has noted, without the storages of some tensors."""
    places = {tensor.untyped_storage().data_ptr() for tensor in besides}
    return sum(size for place, size in saved.items() if place not in places)
