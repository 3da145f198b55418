"""Run a causal LM layer by layer: the model's own code, with the weights of one layer at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .batches import Batch
from .checkpoint import StoredTensor, load_tensor
from .graph import ModelGraph
from .prefetch import Prefetcher

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

RESIDENT_BYTES = 1 << 30
"""Layers stay in memory after their first use while all of them together take no more than this."""

LOGITS_AT_ONCE = 1 << 24
"""Elements; a loss and its gradient take about 16 bytes for each."""


@dataclass(frozen=True)
class LayerArguments:
    """What the model passes to one layer besides the hidden states: masks, position embeddings, …"""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _Recorded(Exception):  # noqa: N818 - stops a forward pass, not an error
    pass


class LayerwiseModel:
    """A model on the meta device; embeddings, norm and head are brought in at once, layers when they are used.

    The layers' `forward` is replaced by a pass-through that records its arguments, so that each layer can be
    called later exactly as its architecture calls it, without code for any architecture here.
    """

    def __init__(
        self, graph: ModelGraph, *, device: str = "cpu", dtype: str = "float32", resident_bytes: int = RESIDENT_BYTES
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.graph = graph
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        config = AutoConfig.from_pretrained(graph.base.folder)
        with torch.device("meta"):
            self.module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        self.layers_path, self._layers = _find_layers(self.module, graph)
        self._forwards = [layer.forward for layer in self._layers]
        self._overrides: dict[int, dict[str, torch.Tensor]] = {}
        size = sum(graph.layer_elements().values()) * self.dtype.itemsize
        self.resident = size <= resident_bytes
        """Whether layers stay in memory after their first use."""
        self.prefetch = False
        """Whether to read the layer that is expected next while another computes."""
        self._prefetcher = Prefetcher(self.device)
        self._bring_in_rest()
        self._returns_tuple: bool | None = None

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Base layer `index` with its weights, for the time of the `with` block."""
        layer = self._layers[index]
        if next(iter(layer.parameters())).is_meta:
            self._load(self._prefetcher.take(index) or self._read_all(self.graph.layer_tensors(index)))
            self._check_complete(layer, f"{self.layers_path}.{index}.")
            for name, value in self._overrides.get(index, {}).items():
                layer.get_parameter(name).data.copy_(value)
        try:
            yield layer
        except BaseException:
            self._prefetcher.drop()  # the sweep ends here, and nobody comes for it
            raise
        finally:
            if not self.resident:
                _drop_weights(layer)

    def expect(self, index: int) -> None:
        """Base layer `index` is the next to be used."""
        if self.prefetch and next(iter(self._layers[index].parameters())).is_meta:
            self._prefetcher.start(
                index, partial(self._read_all, self.graph.layer_tensors(index), pinned=self.device.type == "cuda")
            )

    def forget_rest(self) -> None:
        """Drop embeddings, norm and head; from now on layers alone can be run."""
        inside = {id(module) for layer in self._layers for module in layer.modules()}
        for module in self.module.modules():
            if id(module) not in inside:
                _drop_own_weights(module)

    def override(self, index: int, parameter: str, value: torch.Tensor) -> None:
        """Use another value for a parameter of base layer `index`, from now on."""
        self._overrides.setdefault(index, {})[parameter] = value
        if not (current := self._layers[index].get_parameter(parameter)).is_meta:
            current.data.copy_(value)

    def run_layer(self, index: int, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden) after base layer `index`, whose weights must be in."""
        output = self._forwards[index](hidden, *arguments.positional, **arguments.named)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def record(self, batch: Batch) -> tuple[torch.Tensor, dict[int, LayerArguments]]:
        """The input of the first layer (batch, tokens, hidden), and what each kept layer is called with."""
        import torch

        kept = self.graph.layers
        recorded: dict[int, LayerArguments] = {}
        first: list[torch.Tensor] = []

        def listen(index: int, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
            recorded[index] = arguments
            if not first:
                first.append(hidden)
                if self._returns_tuple is None:
                    raise _Recorded
            if index == len(self._layers) - 1:
                raise _Recorded
            return hidden

        with torch.no_grad():
            self._run_model(batch, listen)
            if self._returns_tuple is None:
                index = next(iter(recorded))
                with self.layer(index):
                    arguments = recorded[index]
                    output = self._forwards[index](first[0], *arguments.positional, **arguments.named)
                self._returns_tuple = isinstance(output, tuple)
                return self.record(batch)
        return first[0], {index: recorded[index] for index in kept}

    def head(self, batch: Batch, hidden: torch.Tensor, positions: slice | None = None) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) for the output of the last layer, at all positions or at one of `head_slices`."""
        import torch

        last, extra = len(self._layers) - 1, {}
        if positions is not None and positions != slice(0, hidden.shape[1]):
            extra["logits_to_keep"] = torch.arange(positions.start, positions.stop, device=self.device)
        output = self._run_model(batch, lambda index, passing, _: hidden if index == last else passing, extra)
        logits: torch.Tensor = output.logits
        return logits

    def head_slices(self, batch: Batch) -> list[slice]:
        """Runs of positions, in order, whose logits are small enough to hold at once."""
        rows, tokens = batch.input_ids.shape
        words = int(self.module.config.get_text_config().vocab_size)
        step = max(1, LOGITS_AT_ONCE // (rows * words))
        if step >= tokens or "logits_to_keep" not in inspect.signature(self.module.forward).parameters:
            return [slice(0, tokens)]
        return [slice(start, min(start + step, tokens - 1)) for start in range(0, tokens - 1, step)]

    def disk_name(self, index: int, parameter: str) -> str:
        """Name in the base checkpoint of a parameter of base layer `index`."""
        name = f"{self.graph.base.layer_prefix}.{index}.{parameter}"
        if name not in self.graph.base.tensors:
            raise ModelError(f"layer {index} has a parameter {parameter!r}, which the checkpoint stores in another form")
        return name

    def _run_model(
        self,
        batch: Batch,
        passing: Callable[[int, torch.Tensor, LayerArguments], torch.Tensor],
        extra: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> Any:
        """Run the model with `passing(index, hidden, arguments)` in place of every layer."""

        def make(index: int) -> Callable[..., Any]:
            def forward(*positional: Any, **named: Any) -> Any:
                hidden = named.pop("hidden_states") if "hidden_states" in named else positional[0]
                rest = positional[1:] if positional else ()
                output = passing(index, hidden, LayerArguments(rest, named))
                return (output,) if self._returns_tuple else output

            return forward

        for index, layer in enumerate(self._layers):
            layer.forward = make(index)
        try:
            return self.module(
                input_ids=batch.input_ids.to(self.device),
                attention_mask=batch.mask.long().to(self.device) if batch.padded else None,
                use_cache=False,
                **extra,
            )
        except _Recorded:
            return None
        finally:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward

    def _bring_in_rest(self) -> None:
        """Load what belongs to no layer, compute buffers that no checkpoint holds, tie what is tied."""
        import torch

        for name, buffer in list(self.module.named_non_persistent_buffers()):
            parent, _, leaf = name.rpartition(".")
            self.module.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device=self.device)
        for parameter in self.module.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.module.initialize_weights()
        missing = self._load(self._read_all(self.graph.other_tensors()))
        self.module.tie_weights(missing_keys=missing, recompute_mapping=False)
        layers = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in layers and parameter.is_meta:
                raise ModelError(f"{str(self.graph.base.folder)!r} lacks the weights of {name!r}")
            parameter.requires_grad_(False)

    def _read_all(self, tensors: dict[str, StoredTensor], *, pinned: bool = False) -> dict[str, torch.Tensor]:
        cast = None if self.module._get_dtype_plan(self.dtype) else self.dtype
        return {name: self.read(tensor, cast, pinned=pinned) for name, tensor in tensors.items()}

    def _load(self, tensors: dict[str, torch.Tensor]) -> set[str]:
        """Bring tensors in through the conversions that transformers applies to this architecture; return what is missing."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        loading, _ = convert_and_load_state_dict_in_model(
            self.module,
            tensors,
            LoadStateDictConfig(
                dtype=self.dtype,
                device_map={"": str(self.device)},
                dtype_plan=self.module._get_dtype_plan(self.dtype),
                weight_mapping=get_model_conversion_mapping(self.module),  # type: ignore[arg-type]
            ),
        )
        if loading.mismatched_keys:
            name, found, wanted = next(iter(loading.mismatched_keys))
            raise ModelError(f"{name!r} has shape {tuple(found)} in the checkpoint, but its config asks for {tuple(wanted)}")
        missing: set[str] = loading.missing_keys
        return missing

    def read(self, stored: StoredTensor, cast: torch.dtype | None, *, pinned: bool = False) -> torch.Tensor:
        """A tensor as it will be exported: rounded to the graph's type before it gets the type to compute in."""
        import torch

        exported: torch.dtype | None = getattr(torch, self.graph.dtype) if self.graph.dtype else None
        if exported is None or stored.dtype_as(self.graph.dtype) == stored.dtype:
            return load_tensor(stored, cast, pinned=pinned)
        rounded = load_tensor(stored, exported)
        return rounded.to(cast) if cast is not None else rounded

    def _check_complete(self, layer: nn.Module, prefix: str) -> None:
        for name, parameter in layer.named_parameters():
            if parameter.is_meta:
                raise ModelError(f"{str(self.graph.base.folder)!r} lacks the weights of {prefix + name!r}")
            parameter.requires_grad_(False)


def _find_layers(module: PreTrainedModel, graph: ModelGraph) -> tuple[str, nn.ModuleList]:
    """The one list of decoder layers: as long as the model is deep, and named as on disk."""
    from torch import nn

    leaf = graph.base.layer_prefix.rpartition(".")[2]
    found = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == graph.base.layers and name.rpartition(".")[2] == leaf
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(module).__name__} has {len(found)} lists of {graph.base.layers} layers named {leaf!r}; "
            "a model whose layers form one list is needed"
        )
    return found[0]


def _drop_weights(layer: nn.Module) -> None:
    for module in layer.modules():
        _drop_own_weights(module)


def _drop_own_weights(module: nn.Module) -> None:
    import torch
    from torch import nn

    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
