"""Push batches through the kept layers, forward and backward, one layer at a time.

Sizes: B sequences a batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .layerwise import Batch, LayerArguments, LayerwiseModel

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..stage import Advance

BATCH_TOKENS = 4096


def make_batches(input_ids: torch.Tensor, attention_mask: torch.Tensor, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Cut samples (samples, T) into batches of about `batch_tokens` tokens, without columns that are all padding."""
    size = max(1, batch_tokens // input_ids.shape[1])
    batches = []
    for ids, mask in zip(input_ids.split(size), attention_mask.bool().split(size), strict=True):
        used = mask.any(dim=0)
        batches.append(Batch(ids[:, used], mask[:, used]))
    return batches


def next_token_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy in fp32 of each token given those before it, (B, T-1); 0 where either is padding."""
    import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by

    targets = batch.input_ids[:, 1:].to(logits.device)
    counted = predicted_tokens(batch).to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return losses * counted


def predicted_tokens(batch: Batch) -> torch.Tensor:
    """Which tokens are predicted from a token before them, bool (B, T-1)."""
    return batch.mask[:, 1:] & batch.mask[:, :-1]


@dataclass(frozen=True)
class ForwardVisit:
    """One batch at one layer of a forward sweep."""

    input: torch.Tensor
    """(B, T, D)"""
    output: torch.Tensor
    """(B, T, D)"""
    mask: torch.Tensor
    """bool (B, T), False where padded."""
    batch: int


@dataclass(frozen=True)
class BackwardVisit(ForwardVisit):
    """One batch at one layer of a backward sweep."""

    gradient: torch.Tensor
    """Of the mean loss over all batches, with respect to the layer's output (B, T, D)."""


@dataclass
class ForwardLayer:
    """One layer of a forward sweep; iterating runs its batches."""

    layer: int
    """In the base model."""
    module: nn.Module
    """With its weights, as long as the sweep stands at it."""
    visits: Iterator[ForwardVisit]

    def __iter__(self) -> Iterator[ForwardVisit]:
        return self.visits


@dataclass
class BackwardLayer:
    """One layer of a backward sweep; iterating runs its batches."""

    layer: int
    """In the base model."""
    module: nn.Module
    visits: Iterator[BackwardVisit]
    weight_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """fp32, by parameter; complete after the last batch. Empty unless asked for."""

    def __iter__(self) -> Iterator[BackwardVisit]:
        return self.visits


class Sweep:
    """The state of a set of batches inside a model: the hidden states at every boundary between its layers.

    After `remove`, the boundaries below the removed layer stay valid and the next `forward` starts there.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        batches: Sequence[Batch],
        *,
        keep_boundaries: bool = True,
        advance: Advance = lambda units=1, /: None,
    ) -> None:
        self.model = model
        self.batches = list(batches)
        self.layers = list(model.graph.layers)
        self.keep_boundaries = keep_boundaries
        self.advance = advance
        self.layer_forwards = 0
        """Passes of all batches through one layer, recomputation included."""
        self.layer_backwards = 0
        recorded = [model.record(batch) for batch in self.batches]
        self._arguments: list[dict[int, LayerArguments]] = [arguments for _, arguments in recorded]
        self._boundaries: list[list[torch.Tensor]] = [[hidden for hidden, _ in recorded]]
        self._done = 0  # layers whose output boundary is valid
        self._predicted = sum(int(predicted_tokens(batch).sum()) for batch in self.batches)

    def boundary(self, position: int) -> list[torch.Tensor]:
        """Hidden states (B, T, D) of each batch before the kept layer at `position`; the last is what enters the final norm."""
        return self._boundaries[position]

    def arguments(self, batch: int, layer: int) -> LayerArguments:
        """What the model calls base layer `layer` with for a batch, besides the hidden states."""
        return self._arguments[batch][layer]

    def remove(self, layer: int) -> None:
        """Take a base layer out of the model."""
        position = self.layers.index(layer)
        del self.layers[position]
        self._invalidate(position)

    def invalidate_from(self, layer: int) -> None:
        """Forget what comes out of a base layer, because its weights have changed."""
        self._invalidate(self.layers.index(layer))

    def forward(self) -> Iterator[ForwardLayer]:
        """Go up from the first layer whose output is not known. A layer that is not iterated is run all the same."""
        for position in range(self._done, len(self.layers)):
            layer = self.layers[position]
            with self.model.layer(layer) as module:
                outputs: list[torch.Tensor] = []
                visits = self._forward_visits(position, outputs)
                yield ForwardLayer(layer, module, visits)
                for _ in visits:
                    pass
            if not self.keep_boundaries:
                self._boundaries[position] = []
            self._boundaries.append(outputs)
            self._done = position + 1
            self.layer_forwards += 1

    def run_forward(self) -> None:
        """Go up to the last layer."""
        for _ in self.forward():
            pass

    def losses(self) -> Iterator[torch.Tensor]:
        """Cross-entropy of each token (B, T-1) of each batch, 0 where padded."""
        import torch

        self.run_forward()
        with torch.no_grad():
            for batch, hidden in zip(self.batches, self._boundaries[-1], strict=True):
                yield next_token_losses(self.model.head(batch, hidden), batch)
                self.advance()

    def logits(self) -> Iterator[torch.Tensor]:
        """Logits (B, T, V) of each batch."""
        import torch

        self.run_forward()
        with torch.no_grad():
            for batch, hidden in zip(self.batches, self._boundaries[-1], strict=True):
                yield self.model.head(batch, hidden)

    def backward(self, *, weight_gradients: bool = False) -> Iterator[BackwardLayer]:
        """Go down from the mean next-token loss over all batches.

        Each layer is recomputed from its stored input. At the lowest layer nothing is computed unless its
        weight gradients are wanted.
        """
        self.run_forward()
        gradients = self._head_gradients()
        for position in reversed(range(len(self.layers))):
            layer = self.layers[position]
            with self.model.layer(layer) as module:
                step = BackwardLayer(layer, module, iter(()))
                below: list[torch.Tensor] = []
                step.visits = self._backward_visits(position, gradients, below, step.weight_gradients if weight_gradients else None)
                yield step
                for _ in step.visits:
                    pass
            if position or weight_gradients:
                self.layer_backwards += 1
                self.layer_forwards += 1
            gradients = below

    def _invalidate(self, position: int) -> None:
        self._done = min(self._done, position)
        del self._boundaries[self._done + 1 :]

    def _forward_visits(self, position: int, outputs: list[torch.Tensor]) -> Iterator[ForwardVisit]:
        import torch

        layer = self.layers[position]
        for index, hidden in enumerate(self._boundaries[position]):
            with torch.no_grad():
                output = self.model.run_layer(layer, hidden, self._arguments[index][layer])
            outputs.append(output)
            yield ForwardVisit(hidden, output, self.batches[index].mask.to(hidden.device), index)
            self.advance()

    def _head_gradients(self) -> list[torch.Tensor]:
        import torch

        gradients = []
        for batch, hidden in zip(self.batches, self._boundaries[-1], strict=True):
            leaf = hidden.detach().requires_grad_()
            with torch.enable_grad():
                loss = next_token_losses(self.model.head(batch, leaf), batch).sum() / self._predicted
            gradients.append(torch.autograd.grad(loss, leaf)[0])
            self.advance()
        return gradients

    def _backward_visits(
        self, position: int, gradients: list[torch.Tensor], below: list[torch.Tensor], weights: dict[str, torch.Tensor] | None
    ) -> Iterator[BackwardVisit]:
        import torch

        layer = self.layers[position]
        module = self.model.module.get_submodule(f"{self.model.layers_path}.{layer}")
        parameters = dict(module.named_parameters()) if weights is not None else {}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            for index, gradient in enumerate(gradients):
                hidden, output = self._boundaries[position][index], self._boundaries[position + 1][index]
                yield BackwardVisit(hidden, output, self.batches[index].mask.to(hidden.device), index, gradient)
                if position or parameters:
                    leaf = hidden.detach().requires_grad_()
                    with torch.enable_grad():
                        again = self.model.run_layer(layer, leaf, self._arguments[index][layer])
                    found = torch.autograd.grad(again, [leaf, *parameters.values()], gradient, allow_unused=True)
                    below.append(found[0])
                    _accumulate(weights, parameters, found[1:])
                self.advance()
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)


def _accumulate(
    sums: dict[str, torch.Tensor] | None, parameters: dict[str, nn.Parameter], gradients: Sequence[torch.Tensor | None]
) -> None:
    """Add gradients in fp32; a parameter that a batch does not use (an expert nobody chose) adds nothing."""
    import torch

    if sums is None:
        return
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if name not in sums:
            sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
        if gradient is not None:
            sums[name] += gradient.float()
