"""Steps of Adam on one layer, and looks at held-out samples, until what leaves the layer is what it should be.

Sizes: B sequences a batch, T tokens, N tokens that are not padding, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import StageError
from ..sweep.layer_graphs import accumulate, opened
from .adam import Adam

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..batches import Batch
    from ..context import Advance
    from ..machine.distributed import ProcessGroup
    from .kept_state import KeptState
    from .refit import RefitSettings
    from .streams import Streams

HELD_OUT = 8
"""One sample of so many is held out: the error on those decides what is kept."""
_WARM_UP = 0.1
_LOOKS = 10
"""The error on the held-out samples is measured so often."""
_LEAST_SIZE = 1e-3
"""Root mean square from which a parameter of smaller values is changed: one of zeros would stay as it is."""
_NUMBERS = "step", "least", "best_step", "error"


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


def type_of_best(written: torch.dtype) -> torch.dtype:
    """The type in which the best weights are held, of those that are written in another: bfloat16 loses nothing that is written."""
    import torch

    return written if written == torch.bfloat16 else torch.float32


class Fitting:
    """One layer, whose weights are in, on its way to less error."""

    def __init__(
        self,
        streams: Streams,
        layer: int,
        parameters: dict[str, nn.Parameter],
        settings: RefitSettings,
        types: dict[str, torch.dtype],
    ) -> None:
        """`types`: that parameters are written in."""
        self._streams, self._pruned, self._layer, self._parameters = streams, streams.pruned, layer, parameters
        self._types = types
        self._settings = settings
        self._group = streams.group
        self._position = streams.graph.layers.index(layer)
        self._training, self._held = split_batches(self._pruned.batches)

    def measure(self) -> float:
        """Mean error of the held-out tokens."""
        import torch

        with torch.no_grad():
            parts = [self._errors(number) for number in self._held]
        sums = {"errors": sum(float(part.double().sum()) for part in parts), "tokens": sum(len(part) for part in parts)}
        sums = self._group.sum_values(sums)
        return sums["errors"] / sums["tokens"]

    def run(self, before: float, advance: Advance, kept: KeptState) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The step after which the error was least, and the weights then; None where it was never less than `before`.

        It goes on from what is `kept`, if anything is.
        """
        import torch

        settings = self._settings
        weights = {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}
        order = _Order(self._training, self._pruned.batches, settings, self._layer, self._group)
        optimiser = Adam(weights)
        sizes = {name: size_of(weight) for name, weight in weights.items()}
        best: dict[str, torch.Tensor] = {}
        first, least, best_step, error = 0, before, 0, before
        every = max(1, settings.steps // _LOOKS)
        if (state := self._find_state(kept)) is not None:
            fill, numbers = state  # one tensor at a time, so that going on takes no more memory than beginning
            first, least, best_step, error = (numbers[name] for name in _NUMBERS)
            for name, weight in weights.items():
                fill(f"{name} weight", weight)
                self._parameters[name].data.copy_(weight)
                if best_step:
                    best[name] = torch.empty_like(weight, dtype=type_of_best(self._types[name]))
                    fill(f"{name} best", best[name])
            optimiser.restore(fill, first)
            for _ in range(first):
                order.draw()
            advance(first, detail=f"layer {self._layer}, held out {error:.4g}")
        for step in range(first, settings.steps):
            loss, gradients = self._differentiate(order.draw())
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
                        best.setdefault(name, torch.empty_like(weight, dtype=type_of_best(self._types[name]))).copy_(weight)
            if self._group.tell(kept.is_due):
                tensors = {f"{name} weight": weight for name, weight in weights.items()}
                tensors |= {f"{name} best": weight for name, weight in best.items()}
                numbers = dict(zip(_NUMBERS, (step + 1, least, best_step, error), strict=True))
                kept.keep({**tensors, **optimiser.list_state()}, numbers)
            advance(detail=f"layer {self._layer}, loss {loss:.4g}, held out {error:.4g}")
        return (best_step, best) if best else None

    def _find_state(self, kept: KeptState) -> tuple[Callable[[str, torch.Tensor], object], dict[str, Any]] | None:
        """Return what the leading process has kept: a function that fills a tensor in all processes by name, and the numbers."""
        state = kept.find() if self._group.leads else None
        numbers = self._group.tell(None if state is None else state[1])

        def fill(name: str, tensor: torch.Tensor) -> None:
            if state is not None:
                tensor.copy_(state[0](name))
            self._group.lead(tensor)

        return None if numbers is None else (fill, numbers)

    def _differentiate(self, numbers: Sequence[int]) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean error over the tokens of some batches of each process, and its gradients in fp32."""
        import torch

        total, tokens, sums = 0.0, 0, {}  # type: ignore[var-annotated]
        with opened(self._parameters) as parameters, torch.enable_grad():
            for number in numbers:
                errors = self._errors(number)
                loss = errors.sum()
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                accumulate(sums, parameters, gradients, 1.0)
                total, tokens = total + float(loss.detach()), tokens + len(errors)
        shared = self._group.sum_values({"errors": total, "tokens": tokens})
        total, tokens = shared["errors"], int(shared["tokens"])
        return total / tokens, {name: self._group.sum(gradient).div_(tokens) for name, gradient in sums.items()}

    def _errors(self, number: int) -> torch.Tensor:
        pruned, model = self._pruned, self._pruned.model
        hidden = pruned.boundary(self._position, number)
        output = model.run_layer(self._layer, hidden, pruned.arguments(number, self._layer))
        return token_errors(output, self._streams.target(self._position, number), pruned.batches[number].mask.to(hidden.device))


class _Order:
    """Which batches each step takes: all in an order drawn anew, again and again."""

    def __init__(
        self, training: Sequence[int], batches: Sequence[Batch], settings: RefitSettings, layer: int, group: ProcessGroup
    ) -> None:
        import torch

        self._training, self._batches, self._samples = training, batches, group.split(settings.batch_size)
        self._generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + layer)
        self._waiting: list[int] = []

    def draw(self) -> list[int]:
        """Batches with the samples that this process takes of one step."""
        import torch

        taken, samples = [], 0
        while samples < self._samples:
            if not self._waiting:
                places = torch.randperm(len(self._training), generator=self._generator)
                self._waiting.extend(self._training[int(place)] for place in places)
            taken.append(self._waiting.pop(0))
            samples += len(self._batches[taken[-1]].input_ids)
        return taken
