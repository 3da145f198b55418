"""Run a causal LM layer by layer: the model's own code, with the weights of one layer at a time."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import dropwhile
from typing import TYPE_CHECKING, Any

from ..batches import Batch
from ..checkpoint import adapter
from ..checkpoint.casts import FOR_COMPUTING, cast_all
from ..checkpoint.graph import ModelGraph
from ..checkpoint.lengths import lengths_apart
from ..checkpoint.loading import hold, load_checked, trace_disk_name
from ..checkpoint.pretrained import read_config
from ..checkpoint.rope import forget_lengths
from ..checkpoint.skeleton import build_skeleton, find_layer_list
from ..errors import ModelError, StageError, first_line
from ..machine.shortages import is_shortage
from .layer_arguments import LayerArguments, OutputShape, hidden_of
from .ledger import Ledger
from .prefetch import Prefetcher
from .weight_sources import StoredWeights, WeightSource

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from ..checkpoint.checkpoint import StoredTensor

RESIDENT_BYTES = 1 << 30
"""Layers stay in memory after their first use while all of them together take no more than this."""

LOGITS_AT_ONCE = 1 << 24
"""Elements; a loss and its gradient take about 16 bytes for each."""


_UNFORESEEN = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)
"""What an architecture raises that does not run one layer at a time."""

_PACKAGE = __name__.partition(".")[0]


class _Recorded(Exception):  # noqa: N818 - stops a forward pass, not an error
    pass


class LayerwiseModel:
    """A model on the meta device; embeddings, norm and head are brought in at once, layers when they are used.

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
        self._weights: WeightSource = weights or StoredWeights(graph.dtype)
        self.ledger = Ledger()
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.module: PreTrainedModel = build_skeleton(read_config(graph.base.folder), graph.base.tensors, self.dtype, device)
        self.words = int(self.module.config.get_text_config().vocab_size)
        """V"""
        self.layers_path, self._layers = find_layer_list(self.module, graph.base.layers, graph.base.layer_prefix)
        self._forwards = [layer.forward for layer in self._layers]
        self._overrides: dict[int, dict[str, torch.Tensor]] = {}
        size = sum(graph.layer_elements().values()) * self.dtype.itemsize
        self.resident = size <= resident_bytes
        """Whether layers stay in memory after their first use."""
        self.prefetch = False
        """Whether to read the layer that is expected next while another computes."""
        self._prefetcher = Prefetcher(self.device)
        self._bring_in_rest()
        forget_lengths(self.module)
        self.lengths_apart = lengths_apart(self.module.config.to_dict())
        """Whether a longer sample in a batch changes what is computed of the others."""
        self._shape_of_output: OutputShape | None = None
        self.shares_state = False
        """Whether a layer has left something for others in an argument that all of them get, such as keys and values."""

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Base layer `index` with its weights, for the time of the `with` block."""
        layer = self._layers[index]
        if _lacks_weights(layer):
            self._bring_in(index)
            self._check_complete(layer, f"{self.layers_path}.{index}.")
            self._weights.finish(layer)
            for name, value in self._overrides.get(index, {}).items():
                layer.get_parameter(name).data.copy_(value)
        try:
            yield layer
        except BaseException:
            self._prefetcher.drop()  # the sweep ends here, and nobody comes for it
            raise
        finally:
            if not self.resident:
                self.drop(index)

    def drop(self, index: int) -> None:
        """Put the weights of base layer `index` back on the meta device."""
        self.ledger.add("layer weights", -_bytes_of(self._layers[index]))
        drop_weights(self._layers[index])

    def expect(self, index: int) -> None:
        """Base layer `index` is the next to be used."""
        if self.prefetch and _lacks_weights(self._layers[index]):
            self._prefetcher.start(index, partial(self._read_all, index, pinned=self.device.type == "cuda"))

    def forget_rest(self) -> None:
        """Drop embeddings, norm and head; from now on layers alone can be run."""
        inside = {id(module) for layer in self._layers for module in layer.modules()}
        for module in self.module.modules():
            if id(module) not in inside:
                _drop_own_weights(module)

    def override(self, index: int, parameter: str, value: torch.Tensor) -> None:
        """Use another value for a parameter of base layer `index`, from now on."""
        current = self._layers[index].get_parameter(parameter)
        value = cast_all(value, current.dtype, f"{self.layers_path}.{index}.{parameter}", FOR_COMPUTING)
        self._overrides.setdefault(index, {})[parameter] = value
        if not current.is_meta:
            current.data.copy_(value)

    def run_layer(self, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden) after base layer `index`, whose weights must be in."""
        sizes = [len(container) for container in arguments.containers]
        output = self._forwards[index](hidden, *arguments.positional, **arguments.named)
        self.shares_state |= sizes != [len(container) for container in arguments.containers]
        return hidden_of(output)

    def record(self, batch: Batch) -> tuple[torch.Tensor, dict[int, LayerArguments]]:
        """The input of the first layer (batch, tokens, hidden), and what each kept layer is called with.

        Raises `ModelError` where layers hand each other more than hidden states.
        """
        import torch

        if self.lengths_apart and batch.padded:
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
            self._run_model(batch, listen)
            if first[0].shape[:2] != batch.input_ids.shape or first[0].ndim != 3:
                raise self._refusal(f"its hidden states have shape {tuple(first[0].shape)}, not (batch, tokens, hidden)")
            if self._shape_of_output is None:
                index = next(iter(recorded))
                with self.layer(index):
                    self._shape_of_output = OutputShape.of(self.try_layer(index, first[0], recorded[index]))
                return self.record(batch)
        if any(self._shape_of_output.hands_on(arguments) for arguments in recorded.values()):
            raise self._refusal("each layer gets more from the one below than hidden states")
        idle = next((index for index in kept if index not in recorded), None)
        if idle is not None:
            raise self._refusal(f"it does not use layer {idle} for text alone")
        return first[0], {index: recorded[index] for index in kept}

    def head(self, batch: Batch, hidden: torch.Tensor, positions: slice | None = None) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) for the output of the last layer, at all positions or at one of `head_slices`."""
        import torch

        last, kept = len(self._layers) - 1, None
        if positions is not None and positions != slice(0, hidden.shape[1]):
            kept = torch.arange(positions.start, positions.stop, device=self.device)
        output = self._run_model(batch, lambda index, passing, _: hidden if index == last else passing, kept)
        logits: torch.Tensor = output.logits
        return logits

    @property
    def can_slice_logits(self) -> bool:
        """Whether the head computes some positions alone."""
        return adapter.can_keep_positions(self.module)

    def parameters_of(self, index: int) -> Iterator[nn.Parameter]:
        """Of base layer `index`, on the meta device unless it is in."""
        return self._layers[index].parameters()

    def head_slices(self, batch: Batch) -> list[slice]:
        """Runs of positions, in order, whose logits are small enough to hold at once."""
        rows, tokens = batch.input_ids.shape
        step = max(1, LOGITS_AT_ONCE // (rows * self.words))
        if step >= tokens or not self.can_slice_logits:
            return [slice(0, tokens)]
        return [slice(start, min(start + step, tokens - 1)) for start in range(0, tokens - 1, step)]

    def disk_name(self, index: int, parameter: str) -> str:
        """Name in the base checkpoint of a parameter of base layer `index`."""
        name = f"{self.graph.base.layer_prefix}.{index}.{parameter}"
        return name if name in self.graph.base.tensors else trace_disk_name(self.graph, index, parameter)

    def _run_model(
        self,
        batch: Batch,
        passing: Callable[[int, torch.Tensor, LayerArguments], torch.Tensor],
        kept: torch.Tensor | None = None,
    ) -> Any:
        """Run the model with `passing(index, hidden, arguments)` in place of every layer."""

        def make(index: int) -> Callable[..., Any]:
            def forward(*positional: Any, **named: Any) -> Any:
                hidden = named.pop("hidden_states") if "hidden_states" in named else positional[0]
                rest = positional[1:] if positional else ()
                output = passing(index, hidden, LayerArguments(rest, named))
                return self._shape_of_output.wrap(output) if self._shape_of_output else output

            return forward

        for index, layer in enumerate(self._layers):
            layer.forward = make(index)
        try:
            with self._refusing():
                mask = batch.mask.long().to(self.device) if batch.padded else None
                return adapter.call_without_cache(self.module, batch.input_ids.to(self.device), mask, kept)
        except _Recorded:
            return None
        finally:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward

    def try_layer(self, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> Any:
        """All that base layer `index` returns. Raises `ModelError` where it does not take these arguments."""
        import torch

        with self._refusing(), torch.no_grad():
            return self._forwards[index](hidden, *arguments.positional, **arguments.named)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Refuse the architecture where its code fails, unless memory runs out or the error rises in code of ours that it calls."""
        try:
            yield
        except _UNFORESEEN as error:
            if is_shortage(error) or rises_in_ours(error):
                raise
            raise self._refusal(f"{type(error).__name__}: {first_line(error)}") from error

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"{type(self.module).__name__} cannot be run layer by layer: {reason}")

    def _bring_in_rest(self) -> None:
        """Load what belongs to no layer, tie what is tied."""
        missing = self._load(self._reads(self.graph.other_tensors())).missing
        adapter.tie_weights(self.module, missing)
        layers = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in layers and parameter.is_meta:
                raise ModelError(f"{str(self.graph.base.folder)!r} lacks the weights of {name!r}")
            parameter.requires_grad_(False)

    def _bring_in(self, index: int) -> None:
        """Load a layer: what was read ahead, else each tensor when it is wanted."""
        ahead = self._prefetcher.take(index)
        self._load(self._reads(self.graph.layer_tensors(index)) if ahead is None else hold(ahead))
        self.ledger.add("layer weights", _bytes_of(self._layers[index]))

    def _load(self, reads: Mapping[str, Callable[[], torch.Tensor]]) -> adapter.Loading:
        return load_checked(self.module, reads, self.dtype, str(self.device))

    def _reads(self, tensors: Mapping[str, StoredTensor], *, pinned: bool = False) -> dict[str, Callable[[], torch.Tensor]]:
        """How each tensor is read, in the type to compute in unless the architecture has types of its own."""
        cast = None if adapter.has_types_of_its_own(self.module, self.dtype) else self.dtype
        return {name: partial(self._weights.read, tensor, cast, pinned=pinned) for name, tensor in tensors.items()}

    def _read_all(self, index: int, *, pinned: bool = False) -> dict[str, torch.Tensor]:
        return {name: read() for name, read in self._reads(self.graph.layer_tensors(index), pinned=pinned).items()}

    def try_load(self, tensors: Mapping[str, StoredTensor]) -> adapter.Loading:
        """Load tensors as the weights of a layer are loaded, and say what became of them."""
        return self._load(self._reads(tensors))

    def _check_complete(self, layer: nn.Module, prefix: str) -> None:
        for name, parameter in layer.named_parameters():
            if parameter.is_meta:
                if adapter.is_tied(self.module, prefix + name):
                    raise self._refusal(f"{prefix + name!r} is shared with another layer")
                raise ModelError(f"{str(self.graph.base.folder)!r} lacks the weights of {prefix + name!r}")
            parameter.requires_grad_(False)


def rises_in_ours(error: BaseException) -> bool:
    """Whether the innermost code behind a failed call, other libraries apart, is of this package and not of transformers.

    An error at the call itself, as of arguments that the architecture does not take, is not ours.
    """
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    behind = dropwhile(lambda module: module in (__name__, "contextlib"), modules)
    tops = [top for top in (module.partition(".")[0] for module in behind) if top in (_PACKAGE, "transformers")]
    return bool(tops) and tops[-1] == _PACKAGE


def _bytes_of(layer: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters() if not parameter.is_meta)


def _lacks_weights(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())


def drop_weights(layer: nn.Module) -> None:
    """Put the weights of a module back on the meta device."""
    for module in layer.modules():
        _drop_own_weights(module)


def _drop_own_weights(module: nn.Module) -> None:
    import torch
    from torch import nn

    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
