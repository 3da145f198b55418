"""Run a causal LM layer by layer: the model's own code, with the weights of one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..batches import Batch
from ..checkpoint import adapter
from ..checkpoint.graph import ModelGraph
from ..checkpoint.lengths import lengths_apart
from ..checkpoint.loading import trace_disk_name
from ..checkpoint.pretrained import read_config
from ..checkpoint.rope import forget_lengths
from ..checkpoint.skeleton import build_skeleton, find_layer_list
from ..errors import StageError
from .layer_arguments import LayerArguments, OutputShape, hidden_of
from .refusals import refuse, refusing
from .weight_loader import RESIDENT_BYTES, WeightLoader
from .weight_sources import StoredWeights, WeightSource

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class _Recorded(Exception):  # noqa: N818 - stops a forward pass, not an error
    pass


class LayerwiseModel:
    """A model on the meta device; layers, embeddings and head are brought in when they are used, all else at once.

    The layers' `forward` is replaced by a pass-through that records its arguments, so that each layer can be
    called later exactly as its architecture calls it, without code for any architecture here.
    """

    def __init__(
        self,
        graph: ModelGraph,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        resident_bytes: int = RESIDENT_BYTES,
        weights: WeightSource | None = None,
    ) -> None:
        """`weights`: where they come from; None: from the checkpoint."""
        import torch

        adapter.silence_progress()
        self.graph = graph
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.module: PreTrainedModel = build_skeleton(read_config(graph.base.folder), graph.base.tensors, self.dtype, device)
        self.words = int(self.module.config.get_text_config().vocab_size)
        """V"""
        self.layers_path, self._layers = find_layer_list(self.module, graph.base.layers, graph.base.layer_prefix)
        self._forwards = [layer.forward for layer in self._layers]
        self.weights = WeightLoader(
            graph,
            self.module,
            self.layers_path,
            dtype=self.dtype,
            device=self.device,
            resident_bytes=resident_bytes,
            source=weights or StoredWeights(graph.dtype),
        )
        forget_lengths(self.module)
        self.lengths_apart = lengths_apart(self.module.config.to_dict())
        """Whether a longer sample in a batch changes what is computed of the others."""
        self._shape_of_output: OutputShape | None = None
        self.shares_state = False
        """Whether a layer has left something for others in an argument that all of them get, such as keys and values."""

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Base layer `index` with its weights, for the time of the `with` block."""
        return self.weights.layer(index)

    def run_layer(self, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden) after base layer `index`, whose weights must be in."""
        sizes = [len(container) for container in arguments.containers]
        output = self._forwards[index](hidden, *arguments.positional, **arguments.named)
        self.shares_state |= sizes != [len(container) for container in arguments.containers]
        return hidden_of(output)

    def record(self, batch: Batch, *, is_made_up: bool = False) -> tuple[torch.Tensor, dict[int, LayerArguments]]:
        """The input of the first layer (batch, tokens, hidden), and what each kept layer is called with.

        `is_made_up`: the input is of random embeddings, and those of the model are not brought in. Raises `ModelError` where layers
        hand each other more than hidden states.
        """
        import torch

        if self.lengths_apart and batch.has_padding:
            raise StageError("samples of several lengths change each other in this model; make batches with lengths_apart")
        kept = self.graph.layers
        recorded: dict[int, LayerArguments] = {}
        first: list[torch.Tensor] = []

        def listen(index: int, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
            recorded[index] = arguments
            if not first:
                first.append(hidden)
                if self._shape_of_output is None:
                    raise _Recorded
            if index == len(self._layers) - 1:
                raise _Recorded
            return hidden

        with torch.no_grad():
            if is_made_up:
                self._run_model(batch, listen, embed=_make_up)
            else:
                with self.weights.embeddings():
                    self._run_model(batch, listen)
            if first[0].shape[:2] != batch.input_ids.shape or first[0].ndim != 3:
                raise refuse(self.module, f"its hidden states have shape {tuple(first[0].shape)}, not (batch, tokens, hidden)")
            if self._shape_of_output is None:
                index = next(iter(recorded))
                with self.weights.unread_layer(index):
                    self._shape_of_output = OutputShape.of(self.try_layer(index, first[0], recorded[index]))
                return self.record(batch, is_made_up=is_made_up)
        if any(self._shape_of_output.hands_on(arguments) for arguments in recorded.values()):
            raise refuse(self.module, "each layer gets more from the one below than hidden states")
        idle = next((index for index in kept if index not in recorded), None)
        if idle is not None:
            raise refuse(self.module, f"it does not use layer {idle} for text alone")
        return first[0], {index: recorded[index] for index in kept}

    def head(self, batch: Batch, hidden: torch.Tensor, positions: slice | None = None) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) for the output of the last layer, at all positions or at those of a slice.

        The embeddings of the tokens do not matter here, and are not brought in.
        """
        import torch

        last, kept = len(self._layers) - 1, None
        if positions is not None and positions != slice(0, hidden.shape[1]):
            kept = torch.arange(positions.start, positions.stop, device=self.device)
        with self.weights.head():
            output = self._run_model(batch, lambda index, passing, _: hidden if index == last else passing, kept, _fill_with_zeros)
        logits: torch.Tensor = output.logits
        return logits

    @property
    def can_slice_logits(self) -> bool:
        """Whether the head computes some positions alone."""
        return adapter.can_keep_positions(self.module)

    def parameters_of(self, index: int) -> Iterator[nn.Parameter]:
        """Parameters of base layer `index`, on the meta device unless its weights are in."""
        return self._layers[index].parameters()

    def disk_name(self, index: int, parameter: str) -> str:
        """Name in the base checkpoint of a parameter of base layer `index`."""
        name = f"{self.graph.base.layer_prefix}.{index}.{parameter}"
        return name if name in self.graph.base.tensors else trace_disk_name(self.graph, index, parameter)

    def _run_model(
        self,
        batch: Batch,
        passing: Callable[[int, torch.Tensor, LayerArguments], torch.Tensor],
        kept: torch.Tensor | None = None,
        embed: Callable[[nn.Embedding, torch.Size], torch.Tensor] | None = None,
    ) -> Any:
        """Run the model with `passing(index, hidden, arguments)` in place of layers.

        `embed(module, shape)`, if given, makes what the embeddings give for token ids (batch, tokens), which may lie on the meta
        device: some models bring them to where the weights are.
        """

        def make(index: int) -> Callable[..., Any]:
            def forward(*positional: Any, **named: Any) -> Any:
                hidden = named.pop("hidden_states") if "hidden_states" in named else positional[0]
                rest = positional[1:] if positional else ()
                output = passing(index, hidden, LayerArguments(rest, named))
                return self._shape_of_output.wrap(output) if self._shape_of_output else output

            return forward

        for index, layer in enumerate(self._layers):
            layer.forward = make(index)
        vocabulary = self.weights.vocabulary.embeddings
        embeddings: Any = None if vocabulary is None else vocabulary.modules[0]
        real = None if embeddings is None else embeddings.forward
        if embeddings is not None and embed is not None:
            embeddings.forward = partial(_give, embed, embeddings, self.device)
        try:
            with refusing(self.module):
                mask = batch.mask.long().to(self.device) if batch.has_padding else None
                return adapter.call_without_cache(self.module, batch.input_ids.to(self.device), mask, kept)
        except _Recorded:
            return None
        finally:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward
            if embeddings is not None:
                embeddings.forward = real

    def try_layer(self, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> Any:
        """All that base layer `index` returns. Raises `ModelError` where it does not take these arguments."""
        import torch

        with refusing(self.module), torch.no_grad():
            return self._forwards[index](hidden, *arguments.positional, **arguments.named)


def _give(
    embed: Callable[[nn.Embedding, torch.Size], torch.Tensor], embeddings: nn.Embedding, device: torch.device, ids: torch.Tensor
) -> torch.Tensor:
    return embed(embeddings, ids.shape).to(device)


def _fill_with_zeros(embeddings: nn.Embedding, shape: torch.Size) -> torch.Tensor:
    import torch

    return torch.zeros((*shape, embeddings.embedding_dim), dtype=embeddings.weight.dtype)


def _make_up(embeddings: nn.Embedding, shape: torch.Size) -> torch.Tensor:
    """Small numbers, other ones at each position, so that experts are chosen evenly."""
    import torch

    made = torch.randn((*shape, embeddings.embedding_dim), generator=torch.Generator().manual_seed(0))
    return made.to(embeddings.weight.dtype)
