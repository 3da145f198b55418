"""How fast a model is beside another one: both are timed in turn, round by round, on this machine.

Sizes: B sequences, T tokens of a prompt, N tokens that are decoded after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from statistics import median
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from ..artifacts import Artifact
from ..checkpoint.graph import ModelGraph
from ..cost.decoding_costs import DecodingShape, Residency, count_pass_bytes, plan_residency
from ..data.tokenizer import count_embeddings
from ..machine.accelerators import name_device
from ..machine.memory import give_back, resident_bytes
from ..metrics import Metric
from .decoders import Decodable, Decoder, Decoding, open_decoder
from .exports import GgufFolder, OnnxFolder, TransformersFolder

if TYPE_CHECKING:
    import torch

    from ..context import Advance, Context


class Rates(BaseModel):
    """What one model did in each round, in tokens a second over all sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: tuple[float, ...]
    decode: tuple[float, ...]


class SpeedCase(BaseModel):
    """One kind of work: B sequences, T tokens of a prompt, N tokens after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: int
    prompt_tokens: int
    new_tokens: int
    rates: Rates
    reference: Rates | None = None
    """Of the model beside it, of which each round was timed next to that of this one."""

    def name_work(self, part: str) -> str:
        """`4 x 128 tokens` for `prefill`, `4 x 32 tokens after 128` for `decode`."""
        if part == "prefill":
            return f"{self.sequences} x {self.prompt_tokens} tokens"
        return f"{self.sequences} x {self.new_tokens} tokens after {self.prompt_tokens}"


class Speed(Artifact):
    """Rates of a model on one machine, beside those of another model."""

    model: str
    """Digest of the model."""
    label: str
    """What was done to the model, for tables."""
    reference: str | None = None
    """Digest of the model beside it."""
    reference_label: str = ""
    program: str
    """What ran the model: `transformers`, `ONNX Runtime`, `llama.cpp`."""
    device: str
    """By torch's name."""
    device_name: str
    """The product: of the processor, or of the GPU."""
    threads: int
    dtype: str
    """Type it computes in; for folders that have their own types, what tables call these."""
    measured_at: str
    """Date and time."""
    cases: tuple[SpeedCase, ...]

    @property
    def setting(self) -> str:
        """How it was measured, for tables."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.program} in {self.dtype} on {self.device} ({self.device_name}), {threads}"

    def describe(self) -> str:
        """How, where and when it was measured, in one line."""
        rounds = len(self.cases[0].rates.prefill)
        beside = f", in turn with the {self.reference_label} model" if self.reference is not None else ""
        return f"{self.setting}; medians of {rounds} rounds{beside}, {self.measured_at}"

    def list_metrics(self) -> Sequence[Metric]:
        metrics: list[Metric] = []
        for case in self.cases:
            for part in ("prefill", "decode"):
                place = {"better": "higher", "on": case.name_work(part), "setting": self.setting}
                own: tuple[float, ...] = getattr(case.rates, part)
                metrics.append(_sum_up(part, own, unit="tokens/s", **place))
                if case.reference is None:
                    continue
                other: tuple[float, ...] = getattr(case.reference, part)
                metrics.append(_sum_up(part, other, unit="tokens/s", model=self.reference, is_reference=True, **place))
                ratios = [one / two for one, two in zip(own, other, strict=True)]
                metrics.append(_sum_up(f"{part}_speedup", ratios, **place))
        return metrics


def _sum_up(name: str, rounds: Sequence[float], **fields: object) -> Metric:
    """The median of several rounds, with their range."""
    return Metric.model_validate({"name": name, "value": median(rounds), "low": min(rounds), "high": max(rounds), **fields})


def measure_speed(
    model: Decodable,
    reference: Decodable | None,
    shapes: Sequence[DecodingShape],
    context: Context,
    *,
    rounds: int,
    warmup: int,
) -> Speed:
    """Time a model and the one beside it in turn, each shape `rounds` times after `warmup` rounds that do not count.

    In every second round the other model comes first. Where both do not fit into memory they are read anew, and warmed up
    anew, in each round. Raises `CapacityError` where not even one fits, `StageError` where a program that runs one is missing.
    """
    import torch

    models = [model] if reference is None else [model, reference]
    device = context.device if isinstance(model, ModelGraph | TransformersFolder) else "cpu"
    residency = _plan(models, shapes, context)
    if not residency.is_together:
        context.note("both models do not fit into memory together; each is read anew in every round")
    prompts = [_draw_prompts(models, shape, context.seed) for shape in shapes]
    timed: list[list[list[Decoding]]] = [[[] for _ in shapes] for _ in models]
    runner = _Rounds(models, shapes, prompts, context.dtype, device, warmup)
    total = (rounds + (warmup if residency.is_together else 0)) * len(models) * len(shapes)
    with context.progress("time passes", total, "") as advance:
        for place, shape, done in runner.run(rounds, residency.is_together, advance):
            timed[place][shape].append(done)
    give_back()
    cases = tuple(
        SpeedCase(
            sequences=shape.sequences,
            prompt_tokens=shape.prompt_tokens,
            new_tokens=shape.new_tokens,
            rates=_rates_of(timed[0][number], shape),
            reference=_rates_of(timed[1][number], shape) if len(models) > 1 else None,
        )
        for number, shape in enumerate(shapes)
    )
    return Speed(
        model=model.digest,
        label=model.label,
        reference=None if reference is None else reference.digest,
        reference_label="" if reference is None else reference.label,
        program=_name_program(model),
        device=device,
        device_name=name_device(device),
        threads=torch.get_num_threads(),
        dtype=_name_types(model, context.dtype),
        measured_at=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        cases=cases,
    )


class _Rounds:
    """The order of passes: round by round, the models in turn, each through all shapes."""

    def __init__(
        self,
        models: Sequence[Decodable],
        shapes: Sequence[DecodingShape],
        prompts: Sequence[torch.Tensor],
        dtype: str,
        device: str,
        warmup: int,
    ) -> None:
        self._models, self._shapes, self._prompts, self._warmup = models, shapes, prompts, warmup
        self._dtype, self._device = dtype, device

    def run(self, rounds: int, is_together: bool, advance: Advance) -> list[tuple[int, int, Decoding]]:
        """Place of the model, place of the shape and times of each pass that counts, in order."""
        done: list[tuple[int, int, Decoding]] = []
        with ExitStack() as stack:
            decoders: dict[int, Decoder] = {}
            if is_together:
                for place, model in enumerate(self._models):
                    decoders[place] = stack.enter_context(open_decoder(model, self._dtype, self._device))
            for number in range((self._warmup if is_together else 0) + rounds):
                counts = not is_together or number >= self._warmup
                places = list(range(len(self._models)))
                for place in places if number % 2 else reversed(places):
                    if is_together:
                        passes = self._pass(decoders[place], advance)
                    else:
                        with open_decoder(self._models[place], self._dtype, self._device) as decoder:
                            for _ in range(max(1, self._warmup)):
                                self._pass(decoder)
                            passes = self._pass(decoder, advance)
                        del decoder
                        give_back()
                    done += [(place, shape, one) for shape, one in enumerate(passes) if counts]
        return done

    def _pass(self, decoder: Decoder, advance: Advance | None = None) -> list[Decoding]:
        passes = []
        for shape, prompts in zip(self._shapes, self._prompts, strict=True):
            passes.append(decoder.decode(prompts, shape.new_tokens))
            if advance is not None:
                advance()
        return passes


def _plan(models: Sequence[Decodable], shapes: Sequence[DecodingShape], context: Context) -> Residency:
    """How the models share the memory; those that another program runs take as much as their files."""
    weights, beside = [], 0
    for model in models:
        counted = [count_pass_bytes(model.graph, shape, context.dtype) for shape in shapes]
        weights.append(counted[0][0] if isinstance(model, ModelGraph) else model.size_bytes)
        beside = max(beside, *(held for _, held in counted))
    free = context.memory - resident_bytes(context.device)
    if sum(weights) + beside > free:
        give_back()
        free = context.memory - resident_bytes(context.device)
    return plan_residency(weights, beside, free, context.dtype)


def _draw_prompts(models: Sequence[Decodable], shape: DecodingShape, seed: int) -> torch.Tensor:
    """Token ids (B, T) that all models know, drawn evenly."""
    import torch

    words = min(count_embeddings(model.graph.base) for model in models)
    return torch.randint(words, (shape.sequences, shape.prompt_tokens), generator=torch.Generator().manual_seed(seed))


def _rates_of(passes: Sequence[Decoding], shape: DecodingShape) -> Rates:
    tokens = shape.sequences * shape.prompt_tokens, shape.sequences * shape.new_tokens
    return Rates(
        prefill=tuple(tokens[0] / one.prefill for one in passes),
        decode=tuple(tokens[1] / one.decode for one in passes),
    )


def _name_program(model: Decodable) -> str:
    if isinstance(model, OnnxFolder):
        return "ONNX Runtime"
    return "llama.cpp" if isinstance(model, GgufFolder) else "transformers"


def _name_types(model: Decodable, dtype: str) -> str:
    if isinstance(model, ModelGraph):
        return dtype
    if isinstance(model, GgufFolder):
        return model.type
    if isinstance(model, OnnxFolder):
        return model.quantisation or model.dtype
    return model.quantisation or model.graph.dtype or "its own types"
