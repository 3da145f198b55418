"""Train a pruned model as a whole to predict what the original does, or the text, and merge what was learned into its weights.

Source: distillation by the teacher's distribution is https://arxiv.org/abs/1503.02531, low-rank updates (LoRA) are
https://arxiv.org/abs/2106.09685: W + B A · alpha / rank. The training loop is that of transformers, LoRA is peft's.
Sizes: S samples, T tokens, K choices of the teacher, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gradmap_pipeline import (
    Artifact,
    Context,
    DatasetSource,
    Estimate,
    Forecasts,
    ModelCosts,
    ModelGraph,
    OptionError,
    Outlook,
    Stage,
    StageError,
    StructureProbe,
    TensorFile,
    check_length,
    check_memory_for_training,
    count_embeddings,
    divergence_from,
    find_top_choices,
    hookimpl,
    known,
    load_tensor,
    load_tokenizer,
    load_whole,
    loss_on,
    make_sequences,
    name_on_disk,
    open_sweep,
    training_bytes,
)

if TYPE_CHECKING:
    import torch

_HELD_OUT = 8
"""One sample of so many is held out."""
_LEAST_SAMPLES = 16
_TAUGHT = 64
"""Samples whose choices are one unit of work."""
_DONE = "complete"
"""File in a checkpoint of the trainer that is whole."""


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


class Distill(Stage):
    """Train a pruned model as a whole towards the original's predictions, by LoRA that is merged, or all of its weights."""

    name = "distill"
    requires = ("accelerate", "peft")
    extra = "distill"
    libraries = ("torch", "transformers", "accelerate", "peft")

    dataset: DatasetSource = Field(description="Text to train on.")
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
        return {"model": model}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()
        self.dataset.check_fits_tokenizer(lambda: load_tokenizer(probe.graph.base))

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        layers, tokens = known(inputs.of(ModelGraph).layers), known(check_length(self.sequence_length, inputs.of(ModelGraph)))
        needs = costs.needs(layers, self.batch_size, tokens)
        weights = costs.count_parameters(layers)
        trained = weights if self.weights == "all" else min(weights, layers * 14 * self.rank * costs.benchmark.hidden_size)
        lines = training_bytes(needs, weights, trained, self.batch_size)
        needed = costs.occupied + sum(lines.values())
        check_memory_for_training(needed, costs.memory, self.weights)
        taught = costs.text(self.samples * tokens) + costs.forward_sweep(len(costs.graph.layers), self.samples, tokens)
        layer = costs.benchmark.layer_pass(self.batch_size, tokens, weight_gradients=True)
        head = costs.benchmark.head_pass(self.batch_size, tokens)
        passes = self.steps * self.batch_size
        forward, backward = layer.forward_for_backward * layers + head.forward, layer.backward * layers + head.backward
        looks = 11 * self.samples // _HELD_OUT
        kept = self.samples * tokens * min(self.top_k, needs.words) * 8
        return taught + Estimate(
            needed,
            bytes_written=kept,
            flops=passes * (layers * (layer.flops + layer.backward_flops) + head.flops + head.backward_flops),
            seconds=passes * (forward + backward) + looks * forward,
            how=f"trained as a whole, {'LoRA' if self.weights == 'lora' else 'all weights'}",
            disk_bytes=kept,
            lines={"program": costs.occupied, **lines},
        )

    def run(self, inputs: Any, context: Context) -> Any:
        graph: ModelGraph = inputs.model
        tokens = self.sequence_length or graph.base.default_sequence_length
        tokenizer, rows = load_tokenizer(graph.base), count_embeddings(graph.base)
        ids, _ = make_sequences(tokenizer, self.dataset.documents(), tokens, self.samples, embeddings=rows)
        if len(ids) < self.samples:
            raise StageError(f"the text gives {len(ids)} sequences of {tokens} tokens; lower 'samples' or 'sequence_length'")
        choices, logs = self._teach(graph.dense, ids, context)
        key = ["train", graph.digest, self._text_key(ids), self.model_dump(mode="json"), context.seed]
        folder = context.folder / "training" if context.keep_folder is None else context.keep_folder(key)
        with _own_randomness(), _quiet():
            values, made = train(self, graph, (ids, choices, logs), folder, context)
        if context.keep_folder is None:
            rmtree(folder, ignore_errors=True)
        if not made.best_step:
            context.note(f"the model is left as it is; no step lowered its loss on held-out samples, {made.before:.4g}")
        else:
            context.note(f"loss on held-out samples {made.before:.4g} → {made.after:.4g}, best after step {made.best_step}")
        patches = {}
        for name, value in values.items():
            patches[name] = TensorFile.save({name: value}, context.folder / f"{name}.safetensors")
        return self.Outputs(model=graph.with_patches(patches, "distilled"), distillation=made)

    def _text_key(self, ids: torch.Tensor) -> str:
        import hashlib

        return hashlib.sha256(ids.numpy().tobytes()).hexdigest()

    def _teach(self, dense: ModelGraph, ids: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Choices int32 (S, T-1, K) of the original, and the logarithms of their probabilities; kept in the store meanwhile."""
        import torch

        parts = []
        with context.progress("read the original's predictions", len(ids), "sample") as advance:
            for some in ids.split(_TAUGHT):

                def compute(some: torch.Tensor = some) -> dict[str, torch.Tensor]:
                    with open_sweep(dense, (some, torch.ones_like(some)), context) as sweep:
                        found = list(find_top_choices(sweep, self.top_k))
                    return {name: torch.cat([one[at] for one in found]) for at, name in enumerate(("choices", "logs"))}

                key = ["teach", dense.digest, self._text_key(some), self.top_k]
                parts.append(context.remember_tensors(key, compute))
                advance(len(some))
        return torch.cat([part["choices"] for part in parts]), torch.cat([part["logs"] for part in parts])


def train(
    stage: Distill, graph: ModelGraph, data: tuple[torch.Tensor, ...], folder: Path, context: Context
) -> tuple[dict[str, torch.Tensor], Distillation]:
    """New tensors by name in the checkpoint, in its types, and what training did. `data`: ids, choices and logs by sample.

    `folder`: holds the trainer's checkpoints; training goes on from the last whole one.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    module: Any = load_whole(graph, "float32", context.device)
    names = name_on_disk(module, graph)
    model: Any = module
    if stage.weights == "lora":
        model = add_lora(module, names, stage.rank, stage.alpha)
    else:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in names)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    samples = [dict(zip(("input_ids", "choices", "logs"), one, strict=True)) for one in zip(*data, strict=True)]
    held = len(samples) // _HELD_OUT
    every = max(1, stage.steps // 10)

    class KlTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            loss = mixed_loss(model, inputs, stage.teacher_share)
            if not math.isfinite(float(loss.detach())):
                step = self.state.global_step + 1
                raise StageError(f"the loss is not finite at step {step} of {stage.steps}; lower 'learning_rate'")
            return (loss, {}) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            import torch

            with torch.no_grad():
                return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    class Tell(TrainerCallback):
        detail = ""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(detail=self.detail)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            shown = {"loss": "loss", "eval_loss": "held out", "learning_rate": "learning rate"}
            found = [f"{text} {logs[name]:.4g}" for name, text in shown.items() if name in (logs or {})]
            self.detail = ", ".join(found) or self.detail

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (folder / f"checkpoint-{state.global_step}" / _DONE).touch()

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=stage.steps, learning_rate=stage.learning_rate, seed=context.seed, report_to=[],
        per_device_train_batch_size=stage.batch_size, per_device_eval_batch_size=stage.batch_size, optim="adamw_torch",
        lr_scheduler_type="linear", warmup_steps=max(1, stage.steps // 10), weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        eval_strategy="steps", save_strategy="steps", eval_steps=every, save_steps=every, save_total_limit=2, disable_tqdm=True,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False, remove_unused_columns=False,
        use_cpu=context.device == "cpu", dataloader_pin_memory=False, prediction_loss_only=True, label_names=[],
    )  # fmt: skip
    tell = Tell()
    trainer = KlTrainer(
        model=model, args=arguments, train_dataset=samples[:-held], eval_dataset=samples[-held:],
        callbacks=[EarlyStoppingCallback(stage.patience), tell],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = False
    before = measure(module, samples[-held:], stage, context.device)
    last = find_whole_checkpoint(folder)
    with context.progress("train", stage.steps, "step") as advance:
        if last is not None:
            advance(int(last.name.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    state = trainer.state
    if stage.weights == "lora":
        module = model.merge_and_unload()
    values = round_as_stored(module, names, graph)
    after = measure(module, samples[-held:], stage, context.device)
    if not after < before:
        return {}, Distillation(before=before, after=before, best_step=0, steps=state.global_step, trained_parameters=trained)
    best = int(str(state.best_model_checkpoint).rpartition("-")[2])
    return values, Distillation(before=before, after=after, best_step=best, steps=state.global_step, trained_parameters=trained)


def mixed_loss(model: Any, inputs: Any, share: float) -> torch.Tensor:
    """Mean over positions of `share` times the KL to the original, and the rest of the loss on text."""
    logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
    parts = []
    if share:
        parts.append(share * divergence_from(logits, inputs["choices"].long(), inputs["logs"]).mean())
    if share < 1:
        parts.append((1 - share) * loss_on(logits, inputs["input_ids"]).mean())
    return sum(parts[1:], parts[0])


def measure(module: Any, samples: list[dict[str, torch.Tensor]], stage: Distill, device: str) -> float:
    """Mean loss of samples, each by itself."""
    import torch

    module.eval()
    with torch.no_grad():
        batches = ({name: part[None].to(device) for name, part in one.items()} for one in samples)
        losses = [float(mixed_loss(module, batch, stage.teacher_share)) for batch in batches]
    return sum(losses) / len(losses)


def add_lora(module: Any, names: dict[str, str], rank: int, alpha: int) -> Any:
    """The model with low-rank updates of the linear maps in its layers, which alone are open to training.

    `names`: parameters that can be written. Raises `StageError` where there is no such map.
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()
    maps = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear | Conv1D) and child is not head and f"{name}.weight" in names
    ]
    if not maps:
        raise StageError("the model has no linear map that LoRA could change; set weights: all")
    conv = isinstance(module.get_submodule(maps[0]), Conv1D)
    return get_peft_model(module, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=maps, fan_in_fan_out=conv))


def round_as_stored(module: Any, names: dict[str, str], graph: ModelGraph) -> dict[str, torch.Tensor]:
    """Give parameters the values that the types of the checkpoint can hold, and return those that are not as the graph has them."""
    import torch

    changed = {}
    for name, parameter in module.named_parameters():
        if name in names:
            stored = graph.stored_tensor(names[name])
            value = parameter.detach().to("cpu", getattr(torch, graph.dtype or stored.torch_dtype)).contiguous().clone()
            if not torch.equal(value, load_tensor(stored).to(value.dtype)):
                changed[names[name]] = value
            parameter.data.copy_(value)
    return changed


def find_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of the trainer that is whole."""
    whole = [file.parent for file in folder.glob(f"checkpoint-*/{_DONE}")]
    return max(whole, key=lambda one: int(one.name.rpartition("-")[2]), default=None)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The states of random numbers are afterwards what they were."""
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """The trainer's own log says nothing meanwhile."""
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Distill]
