"""One layer and the head of a model, tried with made-up weights: what a pass through them takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ..batches import BATCH_TOKENS
from ..machine.accelerators import wait_for
from .machine_speed import time_call

if TYPE_CHECKING:
    import torch

    from ..batches import Batch
    from ..checkpoint.graph import ModelGraph
    from ..sweep.needs import SweepNeeds

_FLOPS = 4e11
"""A timed pass takes at most, forward; but one sample at least."""


@dataclass(frozen=True)
class Pass:
    """One sample through one layer, or through the head."""

    forward: float
    """Seconds."""
    forward_for_backward: float
    """Keeping what autograd needs."""
    backward: float
    flops: float
    """Forward."""
    backward_flops: float
    """As many as forward for the gradient of the input, and as many again for those of the weights."""


class LayerBenchmark:
    """A model without its weights. A layer, or the head, gets made-up ones when it is tried."""

    def __init__(self, graph: ModelGraph, device: str, dtype: str) -> None:
        from ..sweep.layerwise import LayerwiseModel
        from ..sweep.weight_sources import ZeroWeights, make_up

        self._model = LayerwiseModel(graph, device=device, dtype=dtype, resident_bytes=0, weights=ZeroWeights())
        make_up(self._model.module)
        config = self._model.module.config.get_text_config()
        self.hidden_size = int(config.hidden_size)
        """D"""
        self.stored_vocabulary_bytes = sum(tensor.stored_bytes for tensor in self._model.weights.vocabulary.tensors)
        """Of embeddings and head on disk, where they are read when they are used."""
        self.dtype = self._model.dtype
        self.words = int(config.vocab_size)
        """V"""
        self._head_elements = self.hidden_size * self.words
        elements = graph.layer_elements()
        by_size = sorted(elements, key=elements.__getitem__)
        self._layer = by_size[len(by_size) // 2]
        self._layer_elements = elements[self._layer]
        self._needs: dict[int, SweepNeeds] = {}
        self._layers: dict[tuple[int, int, bool], Pass] = {}
        self._heads: dict[tuple[int, int], Pass] = {}

    def needs(self, tokens: int) -> SweepNeeds:
        """What a backward sweep of one sample over all layers would need."""
        from ..sweep.needs import measure_needs

        if tokens not in self._needs:
            self._needs[tokens] = measure_needs(self._model, 1, tokens)
        return self._needs[tokens]

    def layer_pass(self, samples: int, tokens: int, weight_gradients: bool = False) -> Pass:
        """A sample through a layer of middling size, when there are so many."""
        key = (_count_tried(samples, tokens, self._layer_elements), tokens, weight_gradients)
        if key not in self._layers:
            self._layers[key] = self._try_layer(*key)
        return self._layers[key]

    def head_pass(self, samples: int, tokens: int) -> Pass:
        """The losses of a sample, from what leaves the last layer, when there are so many."""
        key = (_count_tried(samples, tokens, self._head_elements), tokens)
        if key not in self._heads:
            self._heads[key] = self._try_head(*key)
        return self._heads[key]

    @cached_property
    def load_seconds(self) -> float:
        """Seconds to bring one layer in, besides reading it."""

        def load() -> None:
            with self._model.layer(self._layer):
                pass

        return self._time(load)

    def _time(self, call: Callable[[], object]) -> float:
        return time_call(call, wait=partial(wait_for, str(self._model.device)))

    def _make_batch(self, samples: int, tokens: int) -> Batch:
        import torch

        from ..batches import Batch

        ids = torch.randint(self.words, (samples, tokens), generator=torch.Generator().manual_seed(0))
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))

    def _try_layer(self, samples: int, tokens: int, weight_gradients: bool) -> Pass:
        import torch

        from ..sweep.weight_sources import make_up

        hidden, arguments = self._model.record(self._make_batch(samples, tokens), is_made_up=True)
        with self._model.layer(self._layer) as module:
            make_up(module)
            wanted = list(module.parameters()) if weight_gradients else []
            for parameter in wanted:
                parameter.requires_grad_(True)
            leaf = hidden.detach().requires_grad_()

            def forward() -> torch.Tensor:
                return self._model.run_layer(self._layer, leaf, arguments[self._layer])

            def backward(output: torch.Tensor) -> object:
                return torch.autograd.grad(output, [leaf, *wanted], output.detach(), retain_graph=True, allow_unused=True)

            with torch.no_grad():
                plain = self._time(forward)
            with_graph = self._time(forward)
            output = forward()
            tried = Pass(
                forward=plain / samples,
                forward_for_backward=with_graph / samples,
                backward=self._time(lambda: backward(output)) / samples,
                flops=(flops := _count_flops(forward) / samples),
                backward_flops=flops * (2 if weight_gradients else 1),
            )
            for parameter in wanted:
                parameter.requires_grad_(False)
        return tried

    def _try_head(self, samples: int, tokens: int) -> Pass:
        from ..sweep.head_losses import compute_losses, differentiate_losses
        from ..sweep.weight_sources import make_up

        batch = self._make_batch(samples, tokens)
        hidden = self._model.record(batch, is_made_up=True)[0]

        def forward() -> torch.Tensor:
            return compute_losses(self._model, batch, hidden)

        with self._model.weights.head():
            make_up(self._model.module)
            both = self._time(lambda: differentiate_losses(self._model, batch, hidden, 1.0)) / samples
            alone = self._time(forward) / samples
            flops = _count_flops(forward) / samples
        return Pass(alone, alone, max(0.0, both - alone), flops, flops)


def _count_tried(samples: int, tokens: int, elements: int) -> int:
    """As many samples of a batch as can be tried in a moment."""
    return max(1, min(samples, BATCH_TOKENS // tokens, int(_FLOPS / (2 * elements * tokens))))


def _count_flops(forward: Callable[[], object]) -> float:
    """Floating-point operations of matrix products and attention in a pass without autograd."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    with torch.no_grad(), counter:
        forward()
    return float(counter.get_total_flops())
