"""Sweeps over all samples of a step, in as many parts as its memory asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..batches import Batch, count_predicted, make_batches
from ..machine.distributed import ProcessGroup
from ..machine.memory import resident_bytes
from .budget import measure_needs, plan_sweep
from .kept_tensors import KeptTensors
from .layerwise import LayerwiseModel
from .sweep import Sweep

if TYPE_CHECKING:
    import torch

    from ..checkpoint.graph import ModelGraph
    from ..context import Advance


class PartedSweep:
    """Sweeps over samples, forward and back, as one `Sweep` where they fit into memory together, else one for each part.

    What is computed must be a sum over samples, unless `divisible` is False. In a group, each process brings its share.
    `backward` False: for forward passes alone.
    """

    def __init__(
        self,
        graph: ModelGraph,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        device: str,
        dtype: str,
        memory: int,
        folder: Path,
        backward: bool = True,
        weight_gradients: bool = False,
        divisible: bool = True,
        group: ProcessGroup | None = None,
        advance: Advance = lambda units=1, /: None,
    ) -> None:
        self.model = LayerwiseModel(graph, device=device, dtype=dtype, resident_bytes=0)
        samples, tokens = input_ids.shape
        needs = measure_needs(self.model, samples, tokens, backward=backward, weight_gradients=weight_gradients)
        self.plan = plan_sweep(needs, memory - resident_bytes(device), divisible=divisible)
        self.model.resident, self.model.prefetch = self.plan.resident, self.plan.prefetch
        self._folder, self._advance, self._weight_gradients = folder, advance, weight_gradients
        size = math.ceil(samples / self.plan.parts)
        parts = zip(input_ids.split(size), attention_mask.split(size), strict=True)
        self._parts = [
            make_batches(ids, mask, self.plan.batch_samples * tokens, lengths_apart=self.model.lengths_apart) for ids, mask in parts
        ]
        predicted = count_predicted(self.batches)
        self._predicted = int((group or ProcessGroup()).sum_values({0: predicted})[0])
        self._removed: list[int] = []
        self._only: Sweep | None = None
        self.layer_forwards = 0
        """Passes of all samples through one layer, recomputation included."""
        self.layer_backwards = 0

    def __iter__(self) -> Iterator[Sweep]:
        """The sweep of each part; what it forgets when it ends is only what another part needs the memory for."""
        for number, batches in enumerate(self._parts):
            sweep = self._only or self._open(batches)
            before = sweep.layer_forwards, sweep.layer_backwards
            yield sweep
            if number == 0:
                self.layer_forwards += sweep.layer_forwards - before[0]
                self.layer_backwards += sweep.layer_backwards - before[1]
            if len(self._parts) == 1:
                self._only = sweep

    @property
    def batches(self) -> list[Batch]:
        """Those of all parts."""
        return [batch for part in self._parts for batch in part]

    def remove(self, layer: int) -> None:
        """Take a base layer out of the model."""
        self._removed.append(layer)
        if self._only is not None:
            self._only.remove(layer)

    def _open(self, batches: list[Batch]) -> Sweep:
        sweep = Sweep(
            self.model,
            batches,
            boundaries=KeptTensors(self.plan.boundary_limit, self._folder),
            keep_graphs=self.plan.keep_graphs,
            weight_gradients=self._weight_gradients,
            predicted=self._predicted,
            advance=self._advance,
        )
        for layer in self._removed:
            sweep.remove(layer)
        return sweep
