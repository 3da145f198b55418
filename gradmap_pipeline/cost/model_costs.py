"""What sweeps over a model would take: sizes from file headers, times from one layer tried with made-up weights."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.companions import find_tokenizer_files
from ..data.generation import GENERATED_TOGETHER, count_generation_bytes, lack_of_memory_for_text
from ..machine.machine import Machine
from ..machine.memory import free_bytes, free_on_host, give_back, keep_blocks, resident_bytes, tune_allocator
from ..machine.memory_advice import lack_of_memory
from ..sweep.memory_plan import SweepPlan, check_least, format_size, plan_sweep
from ..sweep.needs import SweepNeeds
from .estimate import Estimate
from .layer_benchmark import LayerBenchmark
from .machine_speed import MachineSpeed
from .stream_work import StreamWork, estimate_two_streams

if TYPE_CHECKING:
    from collections.abc import Hashable

    from ..data.calibration_sources import CalibrationSource

_TOKEN_BYTES = 40  # of a Python list of ids, and of the tensor made from it
_TOKENIZER_BYTES = 14
"""Reading a tokenizer takes so many bytes of memory for a byte of its files: 13.8 for 33 MB (Gemma 3), 17 for 3.5 MB (SmolLM2)."""


class ModelCosts:
    """A model on this machine, before it is run. No tensor of the checkpoint is loaded.

    Every estimate is of a process that has done nothing else; `memory` bytes are what it may have resident.
    """

    def __init__(self, folder: Path, name: str, dtype: str | None, machine: Machine, store: Path) -> None:
        """Raises `CapacityError` where the embeddings and one layer do not fit."""
        from ..checkpoint.graph import open_folder

        tune_allocator(is_tight=machine.memory is not None)
        keep_blocks()  # as most steps do
        started = time.perf_counter()
        self.graph = open_folder(folder, name, dtype, digest_of=lambda _: "")
        self.base = self.graph.base
        self.device = machine.prepare_torch()
        self.dtype = machine.dtype
        """Floating-point type to compute in, by its name."""
        self.memory = machine.budget(self.device)
        self.host_free = free_on_host(self.device, machine.host_budget(self.device))
        other = max(tensor.elements for tensor in self.graph.other_tensors().values())
        check_least(max(self.layer_elements.values()), other, self.dtype, self.memory, resident_bytes(self.device))
        LayerBenchmark(self.graph, self.device, machine.dtype)
        give_back()
        opened = time.perf_counter()
        self.benchmark = LayerBenchmark(self.graph, self.device, machine.dtype)
        self.open_seconds = time.perf_counter() - opened
        """Seconds to build the model without weights, and to put its buffers and embeddings in place."""
        self.start_seconds = opened - started - self.open_seconds
        """Seconds to import torch and transformers; paid once, by the first step."""
        give_back()
        self.occupied = resident_bytes(self.device)
        """Bytes a process has resident when it has opened the model, without layers, embeddings and head."""
        self.program_bytes = resident_bytes()
        """Bytes the program and its libraries have resident in the machine."""
        self.speed = MachineSpeed(self.base, self.benchmark.dtype, self.device, self.memory, store)
        self._seen: set[Hashable] = set()

    @cached_property
    def layer_elements(self) -> dict[int, int]:
        """Parameters by base layer."""
        return self.graph.layer_elements()

    @property
    def words(self) -> int:
        """Words of the vocabulary."""
        return self.benchmark.words

    @cached_property
    def stored_layer_bytes(self) -> int:
        """Bytes of all layers on disk."""
        return sum(tensor.size for layer in self.graph.layers for tensor in self.graph.layer_tensors(layer).values())

    @cached_property
    def stored_rest_bytes(self) -> int:
        """Bytes of embeddings, norm and head on disk."""
        return sum(tensor.size for tensor in self.graph.other_tensors().values())

    @cached_property
    def embedding_bytes(self) -> int:
        """Bytes on disk of the largest tensor that is in no layer: the embeddings."""
        return max((tensor.size for tensor in self.graph.other_tensors().values()), default=0)

    def first_time(self, key: Hashable) -> bool:
        """True once for each key; a run finds what an earlier step has done in the store."""
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new

    def count_parameters(self, layers: int) -> int:
        """Parameters of the model with so many layers, at their mean size."""
        rest = sum(tensor.elements for tensor in self.graph.other_tensors().values())
        return rest + round(sum(self.layer_elements.values()) * layers / len(self.layer_elements))

    def count_bytes(self, layers: int) -> int:
        """Bytes on disk, as exported."""
        stored = self.graph.size_bytes
        whole = self.count_parameters(len(self.layer_elements))
        return round(stored * self.count_parameters(layers) / whole)

    def needs(self, layers: int, samples: int, tokens: int) -> SweepNeeds:
        """What a backward sweep over a model of so many layers would need, those being of mean size."""
        whole = self.benchmark.needs(tokens)
        share = layers / whole.layers
        return replace(
            whole,
            samples=samples,
            layers=layers,
            all_layer_bytes=round(whole.all_layer_bytes * share),
            stored_bytes=round(whole.stored_bytes * share),
        )

    def opening(self) -> Estimate:
        """Open the model, and read what is neither in a layer nor read when it is used."""
        read = self.stored_rest_bytes - self.benchmark.stored_vocabulary_bytes
        seconds = self.open_seconds + read * self.speed.read_again()
        return Estimate(self.occupied, read, seconds=seconds, lines={"program": self.occupied})

    def text(self, tokens: int, least: int | None = None) -> Estimate:
        """Make ids of so many tokens of text; the time to download it is not known.

        `least`: how many it takes even where the text has no more. Raises `CapacityError` where their ids alone do not fit.
        """
        needed = (tokens if least is None else least) * _TOKEN_BYTES
        allowed = self.memory if self.device == "cpu" else free_bytes()
        if needed > allowed:
            raise lack_of_memory(
                f"the ids of {needed // _TOKEN_BYTES:,} tokens need {format_size(needed)}, over the {format_size(allowed)} "
                f"{'allowed' if self.device == 'cpu' else 'free in the machine'}",
                needed + self.program_bytes,
                ["lower 'samples' or 'sequence_length'"],
            )
        held = _TOKENIZER_BYTES * sum(file.stat().st_size for file in find_tokenizer_files(self.base.folder))
        opening, each = self.speed.tokenizer
        return Estimate(self.program_bytes + held + tokens * _TOKEN_BYTES, seconds=opening + tokens * each)

    def given(self, size: int, times: int = 3) -> Estimate:
        """Tensors of so many bytes that a step gives: written, and read for their digests and for what is not finite.

        `times`: how often they are read.
        """
        return Estimate(
            bytes_read=times * size, bytes_written=size, seconds=size * (times * self.speed.read_again() + self.speed.write)
        )

    def drawn_text(self, source: CalibrationSource, samples: int, tokens: int, layers: int, pool: int = 1) -> Estimate:
        """Draw samples (samples, tokens) as `draw_samples` does. `pool`: how many times as much text is read for them.

        `layers`: of the model that writes the part that a model writes.
        """
        total = Estimate()
        for part, count in zip(source.parts(), source.share_out(samples), strict=True):
            if part.generated is None:
                total += self.text(count * tokens * pool, least=count * tokens)
            else:
                total += self.generated_text(layers, count, tokens)
        return total

    def generated_text(self, layers: int, samples: int, tokens: int) -> Estimate:
        """Samples (samples, tokens) that a model of so many layers writes itself, whole in memory.

        Raises `CapacityError` where the model and one sample do not fit.
        """
        weights, each = count_generation_bytes(self.graph, tokens, self.dtype)
        weights = round(weights * self.count_parameters(layers) / self.count_parameters(len(self.layer_elements)))
        free = self.memory - self.occupied
        if weights + each > free:
            raise lack_of_memory_for_text(weights, each, tokens, self.memory, free, self.dtype)
        together = min(GENERATED_TOGETHER, (free - weights) // each, samples)
        layer, head = self.benchmark.layer_pass(together, 2), self.benchmark.head_pass(together, 2)  # a head needs two tokens
        lines = {"program": self.occupied, "weights": weights, "keys and values": together * each}
        return self.opening() + Estimate(
            peak_bytes=sum(lines.values()),
            bytes_read=self.count_bytes(layers),
            flops=samples * tokens * (layers * layer.flops + head.flops) / 2,
            seconds=samples * tokens * (layers * layer.forward + head.forward) + self.count_bytes(layers) * self.speed.read_again(),
            how=f"{together} sequences at a time",
            lines=lines,
        )

    def forward_sweep(self, layers: int, samples: int, tokens: int, *, besides: int = 0, losses: bool = True) -> Estimate:
        """Samples (samples, tokens) through all layers, one boundary held at a time.

        `besides`: bytes of other files that the step reads and writes. `losses`: whether the head gives their losses after that.
        """
        needs = replace(self.needs(layers, samples, tokens), is_backward=False, keeps_boundaries=False)
        plan = plan_sweep(needs, self.memory - self.occupied, host_free=self.host_free, held=self.occupied)
        layer = self.benchmark.layer_pass(plan.batch_samples, tokens)
        head = self.benchmark.head_pass(plan.batch_samples, tokens) if losses else None
        moving = self.moving(plan.bytes_read - plan.bytes_written, plan.bytes_written, besides)
        passes = samples + (min(samples, plan.batch_samples) if plan.is_resident else 0)  # the first batch warms up
        return self.opening() + Estimate(
            peak_bytes=self.occupied + plan.peak_bytes,
            lines=self._lines_of(plan),
            bytes_read=plan.bytes_read,
            bytes_written=plan.bytes_written,
            flops=passes * (layers * layer.flops + (head.flops if head else 0)),
            seconds=passes * (layers * layer.forward + (head.forward if head else 0)) + moving,
            how=plan.describe(),
            disk_bytes=plan.spilled_bytes,
        )

    def backward_sweeps(
        self, layers: list[int], samples: int, tokens: int, *, weight_gradients: bool = False, divisible: bool = True
    ) -> Estimate:
        """Backward sweeps in a row, over models of so many layers each. Reuse between them is left out."""
        needs = replace(self.needs(layers[0], samples, tokens), has_weight_gradients=weight_gradients)
        plan = plan_sweep(needs, self.memory - self.occupied, divisible=divisible, host_free=self.host_free, held=self.occupied)
        layer, head = (
            self.benchmark.layer_pass(plan.batch_samples, tokens, weight_gradients),
            self.benchmark.head_pass(plan.batch_samples, tokens),
        )
        forward = layer.forward_for_backward if plan.keeps_graphs else layer.forward + layer.forward_for_backward
        lines = self._lines_of(plan)
        total = Estimate(self.occupied + plan.peak_bytes, how=plan.describe(), disk_bytes=plan.spilled_bytes, lines=lines)
        for number, count in enumerate(layers):
            read = plan.bytes_read * count // layers[0] if number == 0 or not plan.is_resident else 0
            forwards = 1 if plan.keeps_graphs else 2
            per_sample = count * (forward + layer.backward) + head.forward_for_backward + head.backward
            flops = count * (forwards * layer.flops + layer.backward_flops) + head.flops + head.backward_flops
            moving = self.moving(max(0, read - plan.bytes_written), plan.bytes_written)
            total += Estimate(0, read, plan.bytes_written, samples * flops, samples * per_sample + moving)
        return self.opening() + total

    def two_streams(self, layers: int, samples: int, tokens: int, work: StreamWork) -> Estimate:
        """The original model and one of so many layers over the same samples, and what is done with both."""
        return estimate_two_streams(self, layers, samples, tokens, work)

    def _lines_of(self, plan: SweepPlan) -> dict[str, int]:
        lines = {str(line): size for line, size in plan.lines.items()}
        return {"program": self.occupied, **lines, "allocator": plan.peak_bytes - sum(plan.lines.values())}

    def moving(self, read: int, spilled: int, besides: int = 0) -> float:
        """Seconds to bring in so many bytes of layers, and to write boundaries and read them again."""
        loads = read / (self.stored_layer_bytes / len(self.graph.layers))
        return read * self.speed.read_again(besides) + loads * self.benchmark.load_seconds + 2 * spilled * self.speed.write
