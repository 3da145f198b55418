"""Refit a kept layer by gradient, until what leaves it is what the original model hands on there.

The error of a token is ‖h' - h‖² / ‖h‖², with h' what leaves the layer and h what enters the next kept layer in the original
model: tokens count alike, however large a few of them are. Adam (https://arxiv.org/abs/1412.6980) lowers its mean.
That the layers beside a cut alone are tuned is from https://arxiv.org/abs/2510.23652, which tunes them by the loss of the whole
model; here each is tuned by what leaves it, so that one layer is in memory.
Sizes: B sequences a batch, T tokens, N tokens that are not padding, D hidden, E elements of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..batches import BATCH_TOKENS
from ..checkpoint.casts import FOR_WRITING, cast_all
from ..errors import ModelError
from ..machine.memory import give_back, resident_bytes
from ..machine.memory_advice import lack_of_memory
from ..sweep.memory_plan import format_size
from .fitting import HELD_OUT, Fitting, type_of_best
from .kept_state import KeptState
from .sites import NotFiniteError
from .streams import plan_streams

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from ..checkpoint.graph import ModelGraph
    from ..context import Advance, Context
    from ..sweep.layerwise import LayerwiseModel
    from ..sweep.needs import SweepNeeds
    from .streams import Streams

_STATE = 16
"""Bytes for each element: the weight in fp32, its gradient, and two moments; besides the best weight so far."""
_KEPT = 16
"""Bytes for each element in a state that is kept: the weight, two moments and the best weight, in fp32."""
_LOSS_COPIES = 8
"""Tensors of the size of a batch's hidden states, of twice their type, that the loss and its gradient take."""


@dataclass(frozen=True)
class RefitSettings:
    """How a layer is refit."""

    steps: int
    learning_rate: float
    """Of Adam, relative to the root mean square of each parameter. It rises for a tenth of the steps and falls to 0."""
    batch_size: int
    """Samples that a step takes."""
    seed: int


@dataclass(frozen=True)
class Refit:
    """What became of a layer. Errors are means over held-out tokens."""

    before: float
    after: float
    """As it is stored; that before, where no step made it less."""
    step: int
    """After which it was best; 0: the layer is as it was."""
    values: dict[str, torch.Tensor]
    """Its parameters by their name inside the layer, in the type of the checkpoint; none where it is as it was."""
    left_out: tuple[str, ...] = ()
    """Parameters that the checkpoint stores in several parts; they stay as they are."""


def count_batch_samples(batch_size: int, samples: int, tokens: int) -> int:
    """Samples that go through the layer together: a divisor of a step's, for which a batch is not large and batches are several."""
    most = max(1, min(BATCH_TOKENS // tokens, samples // HELD_OUT))
    return max(count for count in range(1, batch_size + 1) if batch_size % count == 0 and count <= most)


def count_best_bytes(graph: ModelGraph) -> int:
    """Bytes that an element of the best weights so far takes: 2 where all layers are written in bfloat16, else those of fp32."""
    types = {
        _type_of(graph.dtype or tensor.torch_dtype) for layer in graph.layers for tensor in graph.layer_tensors(layer).values()
    }
    return max(type_of_best(one).itemsize for one in types)


def room_for_refit(needs: SweepNeeds, batch_samples: int, best_bytes: int = 4) -> int:
    """Bytes that refitting the largest layer takes besides its weights. `needs`: of a sweep with gradients.

    `best_bytes`: as `count_best_bytes` says.
    """
    gradients = needs.layer_bytes  # those of one batch
    losses = 2 * _LOSS_COPIES * batch_samples * needs.boundary_bytes
    return (
        (_STATE + best_bytes) * needs.layer_elements
        + 8 * needs.largest_parameter
        + gradients
        + needs.count_work(batch_samples)
        + losses
    )


def disk_for_refit(needs: SweepNeeds) -> int:
    """Bytes on disk that the kept state of the largest layer takes, and the one before it until the next is whole."""
    return 2 * _KEPT * needs.layer_elements


def measure_room_for_refit(graph: ModelGraph, samples: int, tokens: int, batch_samples: int, context: Context) -> int:
    """`room_for_refit` of a model, for samples of so many tokens. Raises `CapacityError` where that does not fit.

    `samples`: of each process.
    """
    from ..sweep.layerwise import LayerwiseModel
    from ..sweep.needs import measure_needs

    needs = measure_needs(
        LayerwiseModel(graph.dense, device=context.device, dtype=context.dtype, resident_bytes=0), samples, tokens
    )
    room = room_for_refit(needs, batch_samples, count_best_bytes(graph))
    give_back()
    free = context.memory - resident_bytes(context.device)
    plan, _ = plan_streams(needs, free, room, held=context.memory - free, goes_up=True)
    if plan.kept_limit < room:
        raise lack_of_memory(
            f"refitting the largest layer takes {format_size(room)} besides its weights, for those in fp32, gradients, Adam's "
            f"moments and activations, and of the memory allowed {format_size(max(0, plan.kept_limit))} are left for that",
            context.memory + room - plan.kept_limit,
            ["lower 'batch_size'", "lower 'sequence_length' of calibrate"],
        )
    return room


def refit_layer(streams: Streams, layer: int, settings: RefitSettings, advance: Advance, folder: Path | None = None) -> Refit:
    """Refit a base layer of the pruned model, in place, in the memory of `room_for_refit`. `advance` counts steps.

    `folder`: where its state is kept every minute meanwhile, by the leading process; a state that is there is where it begins.
    None: nowhere.
    The processes of `streams` share the samples of each step and sum gradients and errors, so that all take the same steps.
    What is stored is never worse on the held-out samples than what was there. Raises `NotFiniteError` where the layer's error is
    not finite before the first step, and `StageError` where the loss is not finite at a step.
    """
    model = streams.pruned.model
    streams.pruned.run_up_to(layer)
    with model.layer(layer) as module:
        names, left_out = find_writable(model, layer, module)
        graph = streams.graph
        types = {name: _type_of(graph.dtype or graph.stored_tensor(disk).torch_dtype) for name, disk in names.items()}
        fitting = Fitting(streams, layer, {name: module.get_parameter(name) for name in names}, settings, types)
        before = fitting.measure()
        if not math.isfinite(before):
            raise NotFiniteError(f"the error of layer {layer}")
        kept = KeptState(folder if streams.group.leads else None)
        found = fitting.run(before, advance, kept) if names else None
        kept.drop()
        give_back()
        if found is not None:
            step, best = found
            values = {}
            for name, value in best.items():
                values[name] = cast_all(value, types[name], names[name], FOR_WRITING)
            put_values(module, values)
            after = fitting.measure()
            if after < before:
                return Refit(before, after, step, {name: value.cpu() for name, value in values.items()}, left_out)
        model.weights.reload(layer)
        return Refit(before, before, 0, {}, left_out)


def find_writable(model: LayerwiseModel, layer: int, module: nn.Module) -> tuple[dict[str, str], tuple[str, ...]]:
    """Name in the checkpoint by name inside the layer, of parameters that are one tensor there; and the other parameters."""
    names, others = {}, []
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            try:
                names[name] = model.disk_name(layer, name)
            except ModelError:
                others.append(name)
    return names, tuple(others)


def put_values(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Set parameters of a layer, by name."""
    for name, value in values.items():
        module.get_parameter(name).data.copy_(value)


def _type_of(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)  # type: ignore[no-any-return]
