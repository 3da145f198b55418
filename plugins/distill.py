"""Train a pruned model as a whole to predict what the original does, or the text, and merge what was learned into its weights.

Source: distillation by the teacher's distribution is https://arxiv.org/abs/1503.02531, low-rank updates (LoRA) are
https://arxiv.org/abs/2106.09685: W + B A · alpha / rank. The training loop is that of transformers, LoRA is peft's.
Sizes: S samples, T tokens, K choices of the teacher, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gradmap_pipeline import (
    Artifact,
    CalibrationSource,
    Context,
    Estimate,
    Forecasts,
    ModelCosts,
    ModelGraph,
    OptionError,
    Outlook,
    ProcessGroup,
    Stage,
    StructureProbe,
    TensorFile,
    TrainingPoint,
    TrainingSettings,
    check_length,
    check_memory_for_training,
    check_room_for_training,
    count_trained,
    draw_samples,
    find_top_choices,
    hookimpl,
    known,
    load_tokenizer,
    measure_training_needs,
    open_sweep,
    train_whole,
    training_bytes,
)

if TYPE_CHECKING:
    import torch

_HELD_OUT = 8
"""One sample of so many is held out."""
_LEAST_SAMPLES = 16
_CHECKPOINTS = 3
"""Of training, on disk at once: the best, the last, and the one being written."""
_TEXT_BYTES = 128 << 20
"""The tokenizer, and text while it is cut."""
_TAUGHT = 64
"""Samples whose choices are one unit of work."""
_SETTINGS = ("teacher_share", "weights", "rank", "alpha", "steps", "learning_rate", "batch_size", "samples_at_once", "patience")
"""Options that training takes as they are."""


class Distillation(Artifact):
    """What training a whole model did. Losses are means over the tokens of held-out samples."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    before: float
    after: float
    best_step: int
    """After which the loss was least; 0: the model is as it was."""
    steps: int
    """Taken until training stopped."""
    trained_parameters: int
    curve: tuple[TrainingPoint, ...] = ()
    """How the losses fell."""


class Distill(Stage):
    """Train a pruned model as a whole towards the original's predictions, by LoRA that is merged, or all of its weights."""

    name = "distill"
    parallel = True
    requires = ("accelerate", "peft")
    extra = "distill"
    libraries = ("torch", "transformers", "accelerate", "peft")

    dataset: CalibrationSource = Field(description="Text to train on; what the model writes itself, the original writes.")
    samples: int = Field(512, ge=_LEAST_SAMPLES, description="Sequences to train on; one in eight of them is held out.")
    sequence_length: int | None = Field(
        None, ge=8, description="Tokens in a sequence. Default: as long as the model is made for, at most 2048."
    )
    teacher_share: float = Field(
        1.0, ge=0, le=1, description="Share of the loss that is the KL to the original's predictions; the rest is the loss on text."
    )
    top_k: int = Field(64, ge=1, description="Likeliest next tokens of the original that are learned; all others count as one.")
    weights: Literal["lora", "all"] = Field(
        "lora", description="`lora`: low-rank updates of the layers' linear maps, merged at the end. `all`: every weight."
    )
    rank: int = Field(16, ge=1, description="Rank of LoRA.")
    alpha: int = Field(32, ge=1, description="LoRA's updates are scaled by alpha / rank.")
    steps: int = Field(300, ge=1, description="Steps of AdamW at most.")
    learning_rate: float = Field(1e-3, gt=0, lt=1, description="Of AdamW; it rises for a tenth of the steps, then falls to 0.")
    batch_size: int = Field(8, ge=1, description="Samples that a step takes.")
    samples_at_once: int | None = Field(
        None,
        ge=1,
        description="Samples of a step that are in memory at once, whose gradients are then summed; less memory, the same step. "
        "Default: all of them.",
    )
    patience: int = Field(3, ge=1, description="Looks at held-out samples, one every tenth of the steps, that may be no better.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        model: ModelGraph
        distillation: Distillation

    def forecast(self, inputs: Forecasts) -> Outlook:
        model = inputs.of(ModelGraph)
        self.dataset.check_amount(self.samples, check_length(self.sequence_length, model), "documents")
        left = self.samples - self.samples // _HELD_OUT
        if self.batch_size > left:
            raise OptionError("batch_size", f"found {self.batch_size}; of {self.samples} samples {left} are left to train on")
        if self.batch_size % self._at_once:
            whole = [part for part in range(1, self.batch_size + 1) if not self.batch_size % part]
            raise OptionError("samples_at_once", f"found {self._at_once}; a step of {self.batch_size} samples takes one of {whole}")
        return {"model": model}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()
        probe.check_shares(self.batch_size)
        base = probe.graph.base
        self.dataset.check_fits_tokenizer(lambda: load_tokenizer(base))
        length = self.sequence_length or base.default_sequence_length
        self.dataset.check_gives(self.samples, length, "documents", lambda: load_tokenizer(base))

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        layers, tokens = known(inputs.of(ModelGraph).layers), known(check_length(self.sequence_length, inputs.of(ModelGraph)))
        weights = costs.count_parameters(layers)
        trained = count_trained(self.weights, weights, layers, self.rank, costs.benchmark.hidden_size)
        check_memory_for_training(costs.occupied + 4 * weights + 8 * trained, costs.memory, self.weights)
        needs = measure_training_needs(costs.graph, tokens, costs.dtype, costs.device)
        kept, settings = self._count_kept(tokens), self._settings
        lines = {
            "program": costs.occupied,
            "text": _TEXT_BYTES,
            "predictions": kept if costs.device == "cpu" else 0,
            **training_bytes(needs, layers, weights, trained, self._at_once, is_summed=self._at_once < self.batch_size),
        }
        needed = sum(lines.values())
        check_memory_for_training(needed, costs.memory, self.weights)
        whole = len(costs.graph.layers)
        taught = costs.drawn_text(self.dataset, self.samples, tokens, whole) + costs.forward_sweep(whole, self.samples, tokens)
        layer = costs.benchmark.layer_pass(self._at_once, tokens, weight_gradients=self.weights == "all")
        head = costs.benchmark.head_pass(self._at_once, tokens)
        passes = self.steps * self.batch_size
        forward, backward = layer.forward_for_backward * layers + head.forward, layer.backward * layers + head.backward
        held, looks = settings.held_out, settings.looks  # each look leaves a checkpoint
        state = 12 * trained  # weights and two moments, fp32
        stored = costs.count_bytes(layers)
        changed = stored if self.weights == "all" else layers * costs.stored_layer_bytes // whole
        training = Estimate(
            needed,
            bytes_read=2 * stored + 4 * trained + 2 * kept,  # to train, to compare with; the best checkpoint
            bytes_written=kept + looks * state,
            flops=passes * (layers * (layer.flops + layer.backward_flops) + head.flops + head.backward_flops),
            seconds=passes * (forward + backward)
            + (looks + 2) * held * forward  # before and after all, too
            + self.steps * trained * costs.speed.update
            + looks * state * costs.speed.write,
            how=f"trained as a whole, {'LoRA' if self.weights == 'lora' else 'all weights'}",
            disk_bytes=kept + _CHECKPOINTS * state,
            lines=lines,
        )
        return training + taught + costs.given(changed)

    def run(self, inputs: Any, context: Context) -> Any:
        graph: ModelGraph = inputs.model
        group = context.group
        group.split(self.batch_size)
        tokens = self.sequence_length or graph.base.default_sequence_length
        kept = self._count_kept(tokens) if context.device == "cpu" else 0
        check_room_for_training(graph, tokens, self._settings, context, kept)  # before the time that predictions take
        ids, _, _ = draw_samples(self.dataset, graph.dense, tokens, self.samples, "documents", context, shuffle=False)
        choices, logs = self._teach(graph.dense, ids, context)
        key = ["train", graph.digest, self._text_key(ids), self.model_dump(mode="json"), context.seed]
        folder = Path(group.tell(str(context.folder / "training"))) if context.keep_folder is None else context.keep_folder(key)
        made = train_whole(graph, (ids, choices, logs), self._settings, folder, context)
        if context.keep_folder is None and group.leads:
            rmtree(folder, ignore_errors=True)
        if not made.best_step:
            context.note(f"the model is left as it is; no step lowered its loss on held-out samples, {made.before:.4g}")
        else:
            context.note(f"loss on held-out samples {made.before:.4g} → {made.after:.4g}, best after step {made.best_step}")
        patches = {}
        for name, value in made.values.items():
            patches[name] = TensorFile.save({name: value}, context.folder / f"{name}.safetensors")
        return self.Outputs(
            model=graph.with_patches(patches, "distilled"),
            distillation=Distillation(
                before=made.before,
                after=made.after,
                best_step=made.best_step,
                steps=made.steps,
                trained_parameters=made.parameters,
                curve=made.curve,
            ),
        )

    def _count_kept(self, tokens: int) -> int:
        """Bytes of the original's predictions, at most: a token and the logarithm of its probability for each choice."""
        return self.samples * tokens * self.top_k * 8

    @property
    def _settings(self) -> TrainingSettings:
        return TrainingSettings(**{name: getattr(self, name) for name in _SETTINGS}, held_out=self.samples // _HELD_OUT)

    @property
    def _at_once(self) -> int:
        return self.samples_at_once or self.batch_size

    def _text_key(self, ids: torch.Tensor) -> str:
        import hashlib

        return hashlib.sha256(ids.numpy().tobytes()).hexdigest()

    def _teach(self, dense: ModelGraph, ids: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Choices int32 (S, T-1, K) of the original, and the logarithms of their probabilities; kept in the store meanwhile."""
        import torch

        parts, group = [], context.group
        with context.progress("read the original's predictions", len(ids), "sample") as advance:
            for some in ids.split(_TAUGHT):

                def compute(some: torch.Tensor = some) -> dict[str, torch.Tensor]:
                    shared = context if len(some) >= group.size else replace(context, group=ProcessGroup())
                    with open_sweep(dense, (some, torch.ones_like(some)), shared) as sweep:
                        read = list(find_top_choices(sweep, self.top_k))
                    values = {name: torch.cat([one[at] for one in read]) for at, name in enumerate(("choices", "logs"))}
                    return {name: join_shares(value, len(some), shared.group) for name, value in values.items()}

                key = ["teach", dense.digest, self._text_key(some), self.top_k]
                parts.append(context.remember_tensors(key, compute))
                advance(len(some))
        return torch.cat([part["choices"] for part in parts]), torch.cat([part["logs"] for part in parts])


def join_shares(values: torch.Tensor, count: int, group: ProcessGroup) -> torch.Tensor:
    """What all processes have found of `count` samples, each of its own (samples, …) as `ProcessGroup.share` gives them."""
    whole = values.new_zeros(count, *values.shape[1:])
    group.share(whole).copy_(values)
    return group.sum(whole)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Distill]
