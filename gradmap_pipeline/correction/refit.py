"""Refit a kept layer by gradient, until what leaves it is what the original model hands on there.

The error of a token is ‖h' - h‖² / ‖h‖², with h' what leaves the layer and h what enters the next kept layer in the original
model: tokens count alike, however large a few of them are. Adam (https://arxiv.org/abs/1412.6980) lowers its mean.
That the layers beside a cut alone are tuned is from https://arxiv.org/abs/2510.23652, which tunes them by the loss of the whole
model; here each is tuned by what leaves it, so that one layer is in memory.
Sizes: B sequences a batch, T tokens, N tokens that are not padding, D hidden, E elements of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..batches import BATCH_TOKENS
from ..checkpoint.casts import FOR_WRITING, cast_all
from ..errors import CapacityError, ModelError, StageError
from ..machine.memory import give_back, resident_bytes
from ..sweep.layer_graphs import accumulate, opened
from ..sweep.memory_plan import format_size
from .adam import Adam
from .sites import NotFiniteError
from .streams import plan_streams

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..batches import Batch
    from ..checkpoint.graph import ModelGraph
    from ..context import Advance, Context
    from ..sweep.layerwise import LayerwiseModel
    from ..sweep.needs import SweepNeeds
    from .streams import Streams

HELD_OUT = 8
"""One sample of so many is held out: the error on those decides what is kept."""
_STATE = 20
"""Bytes for each element: the weight in fp32, its gradient, two moments, and the best weight so far."""
_LOSS_COPIES = 8
"""Tensors of the size of a batch's hidden states, of twice their type, that the loss and its gradient take."""
_WARM_UP = 0.1
_LOOKS = 10
"""How often the error on the held-out samples is measured."""
_LEAST_SIZE = 1e-3
"""Root mean square from which a parameter of smaller values is changed: one of zeros would stay as it is."""


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


def room_for_refit(needs: SweepNeeds, batch_samples: int) -> int:
    """Bytes that refitting the largest layer takes besides its weights. `needs`: of a sweep with gradients."""
    gradients = needs.layer_bytes  # those of one batch
    losses = 2 * _LOSS_COPIES * batch_samples * needs.boundary_bytes
    return _STATE * needs.layer_elements + 8 * needs.largest_parameter + gradients + needs.count_work(batch_samples) + losses


def measure_room_for_refit(graph: ModelGraph, samples: int, tokens: int, batch_samples: int, context: Context) -> int:
    """`room_for_refit` of a model, for samples of so many tokens. Raises `CapacityError` where that does not fit."""
    from ..sweep.layerwise import LayerwiseModel
    from ..sweep.needs import measure_needs

    needs = measure_needs(
        LayerwiseModel(graph.dense, device=context.device, dtype=context.dtype, resident_bytes=0), samples, tokens
    )
    room = room_for_refit(needs, batch_samples)
    give_back()
    free = context.memory - resident_bytes(context.device)
    plan, _ = plan_streams(needs, free, room)
    if plan.kept_limit < room:
        raise CapacityError(
            f"refitting the largest layer takes {format_size(room)} besides its weights, for those in fp32, gradients, Adam's "
            f"moments and activations, and of the memory allowed {format_size(max(0, plan.kept_limit))} are left for that; lower "
            "'batch_size' or 'sequence_length', or allow more with --memory"
        )
    return room


def token_errors(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """‖h' - h‖² / ‖h‖² of each token, (N,), fp32, from output h' and target h (B, T, D) and mask bool (B, T)."""
    left, wanted = output[mask].float(), target[mask].float()
    return (left - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-30)


def size_of(weight: torch.Tensor) -> float:
    """Root mean square of a parameter, which a step is relative to; at least 10⁻³."""
    return max(_LEAST_SIZE, float(weight.norm()) / math.sqrt(weight.numel()))


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate in a step, counted from 0: up in a line for a tenth of all steps, then down to 0."""
    warm = max(1, round(_WARM_UP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def split_batches(batches: Sequence[Batch]) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on, and of those held out: the last ones, with an eighth of all samples or more."""
    samples = sum(len(batch.input_ids) for batch in batches)
    held, count = [], 0
    for number in reversed(range(1, len(batches))):
        held.append(number)
        count += len(batches[number].input_ids)
        if count * HELD_OUT >= samples:
            break
    if not held or not count:
        raise StageError(f"{samples} samples in {len(batches)} batch leave none to hold out; calibrate on more samples")
    return [number for number in range(len(batches)) if number not in held], held[::-1]


def refit_layer(streams: Streams, layer: int, settings: RefitSettings, advance: Advance) -> Refit:
    """Refit a base layer of the pruned model, in place, in the memory of `room_for_refit`. `advance` counts steps.

    What is stored is never worse on the held-out samples than what was there. Raises `NotFiniteError` where the layer's error is
    not finite before the first step, and `StageError` where the loss is not finite at a step.
    """
    model = streams.pruned.model
    streams.pruned.run_up_to(layer)
    with model.layer(layer) as module:
        names, left_out = find_writable(model, layer, module)
        fitting = _Fitting(streams, layer, {name: module.get_parameter(name) for name in names}, settings)
        before = fitting.measure()
        if not math.isfinite(before):
            raise NotFiniteError(f"the error of layer {layer}")
        found = fitting.run(before, advance) if names else None
        give_back()
        if found is not None:
            step, best = found
            values = {}
            for name, value in best.items():
                stored = streams.graph.stored_tensor(names[name])
                values[name] = cast_all(value, _type_of(streams.graph.dtype or stored.torch_dtype), names[name], FOR_WRITING)
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


class _Fitting:
    """One layer, whose weights are in, on its way to less error."""

    def __init__(self, streams: Streams, layer: int, parameters: dict[str, nn.Parameter], settings: RefitSettings) -> None:
        self._streams, self._pruned, self._layer, self._parameters = streams, streams.pruned, layer, parameters
        self._settings = settings
        self._position = streams.graph.layers.index(layer)
        self._training, self._held = split_batches(self._pruned.batches)

    def measure(self) -> float:
        """Mean error of the held-out tokens."""
        import torch

        with torch.no_grad():
            parts = [self._errors(number) for number in self._held]
        return sum(float(part.double().sum()) for part in parts) / sum(len(part) for part in parts)

    def run(self, before: float, advance: Advance) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The step after which the error was least, and the weights then, in fp32; None where it was never less than `before`."""
        import torch

        settings = self._settings
        weights = {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}
        optimiser = Adam(weights)
        sizes = {name: size_of(weight) for name, weight in weights.items()}
        best: dict[str, torch.Tensor] = {}
        least, best_step, error = before, 0, before
        order = self._draw_steps()
        every = max(1, settings.steps // _LOOKS)
        for step in range(settings.steps):
            loss, gradients = self._differentiate(order())
            if not math.isfinite(loss):
                raise StageError(
                    f"the loss of layer {self._layer} is not finite at step {step + 1} of {settings.steps} in "
                    f"{self._pruned.model.dtype}; lower 'learning_rate'".replace("torch.", "")
                )
            rate = settings.learning_rate * rate_at(step, settings.steps)
            optimiser.step(gradients, {name: rate * size for name, size in sizes.items()})
            del gradients
            for name, weight in weights.items():
                self._parameters[name].data.copy_(weight)
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                error = self.measure()
                if error < least:
                    least, best_step = error, step + 1
                    for name, weight in weights.items():
                        best.setdefault(name, torch.empty_like(weight)).copy_(weight)
            advance(detail=f"layer {self._layer}, loss {loss:.4g}, held out {error:.4g}")
        return (best_step, best) if best else None

    def _differentiate(self, numbers: Sequence[int]) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean error over the tokens of some batches, and its gradients in fp32."""
        import torch

        total, tokens, sums = 0.0, 0, {}  # type: ignore[var-annotated]
        with opened(self._parameters) as parameters, torch.enable_grad():
            for number in numbers:
                errors = self._errors(number)
                loss = errors.sum()
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                accumulate(sums, parameters, gradients, 1.0)
                total, tokens = total + float(loss.detach()), tokens + len(errors)
        return total / tokens, {name: gradient.div_(tokens) for name, gradient in sums.items()}

    def _errors(self, number: int) -> torch.Tensor:
        pruned, model = self._pruned, self._pruned.model
        hidden = pruned.boundary(self._position, number)
        output = model.run_layer(self._layer, hidden, pruned.arguments(number, self._layer))
        return token_errors(output, self._streams.target(self._position, number), pruned.batches[number].mask.to(hidden.device))

    def _draw_steps(self) -> Callable[[], list[int]]:
        """A function that gives the batches of the next step: all in an order drawn anew, again and again."""
        import torch

        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + self._layer)
        waiting: list[int] = []

        def draw() -> list[int]:
            taken, samples = [], 0
            while samples < self._settings.batch_size:
                if not waiting:
                    waiting.extend(self._training[int(place)] for place in torch.randperm(len(self._training), generator=generator))
                taken.append(waiting.pop(0))
                samples += len(self._pruned.batches[taken[-1]].input_ids)
            return taken

        return draw
