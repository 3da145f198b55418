"""Push batches through the kept layers, forward and backward, one layer at a time.

Sizes: B sequences a batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from ..batches import Batch, count_predicted, take_first
from ..context import Advance, count_nothing
from ..errors import ModelError
from ..machine.distributed import ProcessGroup
from .candidates import Outputs, run_layers, sum_losses
from .head_losses import compute_logits, compute_losses, differentiate_losses
from .kept_tensors import CANDIDATE, GRADIENTS, TAKEN, KeptTensors
from .layer_arguments import KeptArguments, LayerArguments
from .layer_graphs import LayerGraphs, accumulate, opened
from .layerwise import LayerwiseModel
from .taken_inputs import TakenInputs
from .visits import BackwardLayer, BackwardVisit, ForwardLayer, ForwardVisit
from .wanted import WantedBoundaries

if TYPE_CHECKING:
    import torch
    from torch import nn


_PROBE_TOKENS = 64


class SamplePass:
    """The state of a set of batches inside a model: the hidden states at every boundary between its layers.

    After `remove`, the boundaries below the removed layer stay valid and the next `forward` starts there.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        batches: Sequence[Batch],
        *,
        kept: KeptTensors | None = None,
        keep_boundaries: bool = True,
        keep_graphs: bool = False,
        weight_gradients: bool = False,
        predicted: int | None = None,
        advance: Advance = count_nothing,
    ) -> None:
        """`keep_boundaries` False: for one forward pass, holding one boundary at a time. `keep_graphs`: keep what autograd needs
        from the forward pass, where layers stay in memory. `weight_gradients`: go down with gradients of the layers' parameters.
        `predicted`: tokens that the mean loss is over, where these are a part of more."""
        self.model = model
        self.batches = list(batches)
        self._masks = [batch.mask.to(model.device) for batch in self.batches]  # once: the host waits for such a copy
        self.layers = list(model.graph.layers)
        self._wanted = WantedBoundaries(None if keep_boundaries else ())
        self.keeps_graphs = keep_graphs and model.weights.is_resident
        self.has_weight_gradients = weight_gradients
        self.advance = advance
        self.scorers = ProcessGroup()
        """The processes that have the same samples and share the layers to score."""
        self.layer_forwards = 0
        """Passes of all batches through one layer, recomputation included."""
        self.layer_backwards = 0
        self._kept = KeptTensors(ledger=model.weights.ledger) if kept is None else kept
        self._arguments = KeptArguments(self._kept)
        self.taken = TakenInputs(self._kept, self.batches)
        """Inputs of a map of the layer that the sweep looks at, where something keeps them."""
        self._few = take_first(self.batches[0], _PROBE_TOKENS)
        with model.weights.embeddings():
            for index, batch in enumerate(self.batches):
                hidden, arguments = model.record(batch)
                self._kept.put(0, index, hidden)
                self._arguments.add(index, arguments)
            self._few_arguments = model.record(self._few)[1]
        self._graphs = LayerGraphs(keep=self.keeps_graphs)
        self.done = 0
        """Layers, from the bottom, whose outputs are known."""
        self.predicted = predicted or count_predicted(self.batches)
        """Tokens that the mean loss is over."""
        # Gradients of a mean are too small for float16; those of the sum, nearly, are not.
        self._scale = 2.0 ** round(math.log2(max(self.predicted, 1))) if str(model.dtype) == "torch.float16" else 1.0

    def boundary(self, position: int, batch: int) -> torch.Tensor:
        """Hidden states (B, T, D) before the kept layer at `position`; the last is what enters the final norm.

        Raises `PluginError` where the sweep has not come there, or has gone on from there and keeps none.
        """
        if not self._kept.has(position, batch):
            raise self._wanted.explain(position, self.done)
        return self._kept.get(position, batch)

    def arguments(self, batch: int, layer: int) -> LayerArguments:
        """What the model calls base layer `layer` with for a batch, besides the hidden states."""
        return self._arguments.get(batch, layer)

    def probe(self, layer: int) -> tuple[torch.Tensor, LayerArguments]:
        """What enters base layer `layer` for the first tokens (1, n, D), and what it is called with: to try it at little cost."""
        self.run_up_to(layer)
        hidden = self.boundary(self.layers.index(layer), 0)[:1, : self._few.input_ids.shape[1]]
        return hidden, self._few_arguments[layer]

    def own(self, layers: Sequence[int]) -> list[int]:
        """Those of the layers to score that this process scores: all, unless processes share layers instead of samples."""
        return self.scorers.deal(layers)  # forth and back, as those further up have fewer above them

    def remove(self, layer: int) -> None:
        """Take a base layer out of the model."""
        position = self.layers.index(layer)
        del self.layers[position]
        self._invalidate(position)

    def keep_only(self, positions: Collection[int]) -> None:
        """Forget the hidden states at all other boundaries, those on the way up as soon as they have been used."""
        self._wanted = WantedBoundaries(positions)
        for position in set(range(self.done)).difference(positions):
            self._kept.drop(position)

    def invalidate_from(self, layer: int) -> None:
        """Forget what comes out of a base layer, because its weights have changed."""
        self._invalidate(self.layers.index(layer))

    def forward(self) -> Iterator[ForwardLayer]:
        """Go up from the first layer whose output is not known. A layer that is not iterated is run all the same."""
        yield from self._forward_to(len(self.layers))

    def _forward_to(self, end: int) -> Iterator[ForwardLayer]:
        self._kept.is_going_down = False
        for position in range(self.done, end):
            layer = self.layers[position]
            with self.model.layer(layer) as module, opened(self._parameters_of(module)):
                if position + 1 < len(self.layers):
                    self.model.weights.expect(self.layers[position + 1])
                visits = self._forward_visits(position)
                yield ForwardLayer(layer, module, visits)
                for _ in visits:
                    pass
            self.done = position + 1
            self.layer_forwards += 1

    def run_forward(self) -> None:
        """Go up to the last layer."""
        deque(self.forward(), maxlen=0)

    def run_up_to(self, layer: int, *, through: bool = False) -> None:
        """Go up to what enters a base layer; `through`: to what leaves it."""
        deque(self._forward_to(self.layers.index(layer) + through), maxlen=0)

    @contextmanager
    def look(self, layer: int, *, keep: bool = False) -> Iterator[ForwardLayer]:
        """Stand at a base layer to see what it computes now; all its batches must be seen. `keep`: go on from there afterwards."""
        self.run_up_to(layer)
        position = self.layers.index(layer)
        with self.model.layer(layer) as module:
            yield ForwardLayer(layer, module, self._forward_visits(position, keep=keep))
        if keep:
            self.done = position + 1
            self._invalidate(position + 1, keep_taken=True)
        self.layer_forwards += 1

    def change_output(self, layer: int, change: torch.Tensor) -> None:
        """Add to what leaves a base layer what the change of a weight adds (inputs, D), of the map whose inputs are in `taken`."""
        position = self.layers.index(layer)
        self.taken.add_change(position + 1, change)
        self._invalidate(position + 1)

    def losses(self) -> Iterator[torch.Tensor]:
        """Cross-entropy of each token (B, T-1) of each batch, 0 where padded."""
        self.run_forward()
        with self.model.weights.head():
            for index, batch in enumerate(self.batches):
                yield compute_losses(self.model, batch, self._kept.get(len(self.layers), index))
                self.advance()

    def loss_without(self, layer: int, *, from_bottom: bool = False) -> float:
        """Sum of the losses of all tokens with one base layer left out; what lies below it is not computed again.

        `from_bottom`: compute it again all the same. Raises `PluginError` where the sweep keeps no hidden states.
        """
        self._wanted.check_all("a loss without a layer starts")
        self.run_up_to(layer)
        start = 0 if from_bottom else self.layers.index(layer)
        return sum_losses(self, self.outputs_of([other for other in self.layers[start:] if other != layer], start))

    def outputs_of(self, layers: Sequence[int], start: int) -> Iterator[Outputs]:
        """Run some base layers one after another from what enters the layer at `start`: batches, and what leaves the last layer.

        They come in groups, of those that are run together. Raises `PluginError` where the sweep keeps no hidden states.
        """
        self._wanted.check_all("a run of some layers starts")
        return run_layers(self, self._kept, layers, start)

    def logits(self, last: int | None = None) -> Iterator[torch.Tensor]:
        """Logits (B, T, V) of each batch; of the `last` positions alone, where that is given."""
        self.run_forward()
        with self.model.weights.head():
            for index, batch in enumerate(self.batches):
                yield compute_logits(self.model, batch, self._kept.get(len(self.layers), index), last)

    def backward(self) -> Iterator[BackwardLayer]:
        """Go down from the mean next-token loss over all batches.

        A layer whose graph was not kept is recomputed from its stored input. At the lowest layer nothing is
        computed unless its weight gradients are wanted.
        """
        self.run_forward()
        if self.model.shares_state:
            raise ModelError("layers use keys and values of other layers, so the gradients of hidden states are not complete")
        self._kept.is_going_down = True
        self.put_head_gradients()
        for position in reversed(range(len(self.layers))):
            layer = self.layers[position]
            with self.model.layer(layer) as module, opened(self._parameters_of(module)) as parameters:
                if position:
                    self.model.weights.expect(self.layers[position - 1])
                step = BackwardLayer(layer, module, iter(()))
                step.visits = self._backward_visits(position, parameters, step.weight_gradients)
                with self._sums_booked(parameters):
                    yield step
                    for _ in step.visits:
                        pass
            if self._needs_gradient(position):
                self.layer_backwards += 1
        self._kept.drop(GRADIENTS)

    def _sums_booked(self, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
        size = sum(4 * parameter.numel() + parameter.nbytes for parameter in parameters.values())
        return self.model.weights.ledger.holding("weight gradients", size)

    def _needs_gradient(self, position: int) -> bool:
        return position > 0 or self.has_weight_gradients

    def _invalidate(self, position: int, *, keep_taken: bool = False) -> None:
        self.done = min(self.done, position)
        self._kept.drop_from(self.done + 1, TAKEN if keep_taken else CANDIDATE)
        self._graphs.drop_from(self.done)

    def _forward_visits(self, position: int, *, keep: bool = True) -> Iterator[ForwardVisit]:
        import torch

        for index in range(len(self.batches)):
            hidden = self.boundary(position, index)
            if keep and self.keeps_graphs and self._needs_gradient(position):
                output = self._run_with_graph(position, index, hidden).detach()
            else:
                with torch.no_grad():
                    layer = self.layers[position]
                    output = self.model.run_layer(layer, hidden, self.arguments(index, layer))
            if keep:
                if position not in self._wanted:
                    self._kept.forget(position, index)
                self._kept.put(position + 1, index, output)
            yield ForwardVisit(hidden, output, self._masks[index], index)
            self.advance()

    def put_head_gradients(self) -> None:
        """Compute the gradient of the mean loss with respect to the output of the last layer, (B, T, D) for each batch."""
        with self.model.weights.head():
            for index, batch in enumerate(self.batches):
                hidden = self._kept.get(len(self.layers), index)
                self._kept.put(GRADIENTS, index, differentiate_losses(self.model, batch, hidden, self._scale / self.predicted))
                self.advance()

    def _run_with_graph(self, position: int, index: int, hidden: torch.Tensor) -> torch.Tensor:
        layer = self.layers[position]
        arguments = self.arguments(index, layer)
        return self._graphs.run(position, index, hidden, lambda leaf: self.model.run_layer(layer, leaf, arguments))

    def _parameters_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a layer whose gradients are wanted."""
        return dict(module.named_parameters()) if self.has_weight_gradients else {}

    def _backward_visits(
        self,
        position: int,
        parameters: dict[str, nn.Parameter],
        weight_gradients: dict[str, torch.Tensor],
    ) -> Iterator[BackwardVisit]:
        has_recomputed = False
        for index in range(len(self.batches)):
            gradient = self._kept.get(GRADIENTS, index)
            hidden, output = self._kept.get(position, index), self._kept.get(position + 1, index)
            shown = gradient if self._scale == 1 else gradient.float() / self._scale
            yield BackwardVisit(hidden, output, self._masks[index], index, shown)
            if self._needs_gradient(position):
                if not self._graphs.has(position, index):
                    self._run_with_graph(position, index, hidden)
                    has_recomputed = True
                below, others = self._graphs.differentiate(position, index, gradient, list(parameters.values()))
                accumulate(weight_gradients, parameters, others, self._scale)
                self._kept.put(GRADIENTS, index, below)
                del gradient, below, others, shown
            self.advance()
        self.layer_forwards += has_recomputed
