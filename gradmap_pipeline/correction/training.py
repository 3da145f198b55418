"""Train a model as a whole, in memory, with weights in fp32, by transformers' loop; what is learned ends in weights that are there.

LoRA, https://arxiv.org/abs/2106.09685, is peft's: W + B A · alpha / rank, merged at the end.
Sizes: S samples, T tokens, K choices of the teacher.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoint.architecture import layer_of
from ..checkpoint.checkpoint import load_tensor
from ..checkpoint.whole import load_whole, name_on_disk
from ..errors import CapacityError, StageError
from ..machine.memory import keep_blocks, resident_bytes
from .distilling import divergence_from, loss_on
from .training_curve import TrainingPoint, thin_out
from .training_memory import check_memory_for_training, count_trained, measure_training_needs, training_bytes
from .training_surroundings import own_randomness, quiet, seen_processes

if TYPE_CHECKING:
    import torch

    from ..checkpoint.graph import ModelGraph
    from ..context import Context

LOOKS = 10
"""How often, at most, the loss on the held-out samples is measured."""
_DONE = "complete"
"""File in a checkpoint of the trainer that is whole."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained as a whole."""

    teacher_share: float
    """Share of the loss that is the KL to the teacher's predictions; the rest is the loss on text."""
    weights: Literal["lora", "all"]
    rank: int
    """Of LoRA."""
    alpha: int
    steps: int
    """At most."""
    learning_rate: float
    """Of AdamW; it rises for a tenth of the steps, then falls to 0."""
    batch_size: int
    """Samples that a step takes."""
    patience: int
    """Looks at the held-out samples that may be no better before training stops."""
    held_out: int
    """Samples, the last ones, that are not trained on."""
    samples_at_once: int | None = None
    """Samples of a step in memory at a time; a divisor of `batch_size`. None: all."""

    def at_once(self, processes: int = 1) -> int:
        """Samples that each of some processes has in memory at a time."""
        return math.gcd(self.samples_at_once or self.batch_size, self.batch_size // processes)

    @property
    def steps_between_looks(self) -> int:
        """Steps after which the loss on the held-out samples is measured, each time."""
        return math.ceil(self.steps / LOOKS)

    @property
    def looks(self) -> int:
        """How often the loss on the held-out samples is measured meanwhile; the last step is followed by a look."""
        return math.ceil(self.steps / self.steps_between_looks)


@dataclass(frozen=True)
class Trained:
    """What training did. Losses are means over the tokens of held-out samples."""

    values: dict[str, torch.Tensor]
    """New tensors by name in the checkpoint, in its types; none where no step lowered the loss."""
    before: float
    after: float
    """With the values as they are stored."""
    best_step: int
    steps: int
    parameters: int
    """That were trained."""
    curve: tuple[TrainingPoint, ...]


def train_whole(
    graph: ModelGraph, data: Sequence[torch.Tensor], settings: TrainingSettings, folder: Path, context: Context
) -> Trained:
    """Train a model on ids int64 (S, T), and the choices int32 and their logs fp32 (S, T-1, K) that `find_top_choices` gives.

    `folder`: holds the trainer's checkpoints, of all processes; training goes on from the last whole one. The processes of the
    step share the samples of each step and sum their gradients. Samples beyond the last whole step of a pass over all are left
    out. Whether it fits into memory is for `check_room_for_training` to say. Raises `StageError` where a loss is not finite.
    """
    keep_blocks()  # each step asks for the same ones; what is lost between them is in `training_bytes`
    with own_randomness(context.seed), quiet(), seen_processes(context.group, context.device):
        return _train(graph, data, settings, folder, context)


def check_room_for_training(graph: ModelGraph, tokens: int, settings: TrainingSettings, context: Context, besides: int = 0) -> None:
    """Raise `CapacityError` in all processes where training on samples of some tokens does not fit into the memory of one.

    `besides`: bytes that will be there, too.
    """
    with context.group.agreeing(CapacityError):
        _check_own_room(graph, tokens, settings, context, besides)


def _check_own_room(graph: ModelGraph, tokens: int, settings: TrainingSettings, context: Context, besides: int) -> None:
    layers, parameters, processes = len(graph.layers), graph.count_parameters(), context.group.size
    there = resident_bytes(context.device) + besides
    check_memory_for_training(there + 4 * parameters, context.memory, settings.weights)
    needs = measure_training_needs(graph, tokens, context.dtype, context.device)
    trained = count_trained(settings.weights, parameters, layers, settings.rank, needs.width)
    at_once = settings.at_once(processes)
    is_summed = at_once * processes < settings.batch_size
    lines = training_bytes(needs, layers, parameters, trained, at_once, processes, is_summed=is_summed)
    check_memory_for_training(there + sum(lines.values()), context.memory, settings.weights)


def _train(graph: ModelGraph, data: Sequence[torch.Tensor], settings: TrainingSettings, folder: Path, context: Context) -> Trained:
    import torch
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    module: Any = load_whole(graph, "float32", context.device)
    names = name_on_disk(module, graph)
    left = sorted({re.sub(r"\.\d+\.", ".*.", name) for name, _ in module.named_parameters() if name not in names})
    if left:
        context.note(f"not trained, as the checkpoint stores them in several parts: {', '.join(left)}")
    model: Any = module
    if settings.weights == "lora":
        inside = {name: disk for name, disk in names.items() if layer_of(disk, graph.base.layer_prefix) is not None}
        model = add_lora(module, inside, settings.rank, settings.alpha)
    else:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in names)
    module.save_pretrained = partial(
        module.save_pretrained, save_original_format=False
    )  # by names of today, for the trainer reads them
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    samples = [dict(zip(("input_ids", "choices", "logs"), one, strict=True)) for one in zip(*data, strict=True)]
    held, every = settings.held_out, settings.steps_between_looks

    class KlTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            with torch.autocast(torch.device(context.device).type, torch.bfloat16, enabled=context.dtype == "bfloat16"):
                loss = mixed_loss(model, inputs, settings.teacher_share)
            if not math.isfinite(float(loss.detach())):
                step = self.state.global_step + 1
                raise StageError(f"the loss is not finite at step {step} of {settings.steps}; lower 'learning_rate'")
            return (loss, {}) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            with torch.no_grad():
                return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    class Tell(TrainerCallback):
        def __init__(self) -> None:
            self.latest: dict[str, float] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shown = {"loss": "loss", "learning_rate": "learning rate", "eval_loss": "held out"}
            advance(detail=", ".join(f"{text} {self.latest[name]:.4g}" for name, text in shown.items() if name in self.latest))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.latest |= logs or {}

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            context.group.agree(None)  # each process has written what it needs to go on
            if context.group.leads:
                (folder / f"checkpoint-{state.global_step}" / _DONE).touch()

    at_once, processes = settings.at_once(context.group.size), context.group.size
    looked_at = at_once if processes == 1 else math.gcd(at_once, held)  # else some are looked at twice
    whole = (len(samples) - held) // settings.batch_size * settings.batch_size
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=settings.steps, learning_rate=settings.learning_rate, seed=context.seed, report_to=[],
        per_device_train_batch_size=at_once, per_device_eval_batch_size=looked_at, optim="adamw_torch",
        gradient_accumulation_steps=settings.batch_size // processes // at_once,
        lr_scheduler_type="linear", warmup_steps=max(1, settings.steps // 10), weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        eval_strategy="steps", save_strategy="steps", eval_steps=every, save_steps=every, save_total_limit=2, disable_tqdm=True,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False, remove_unused_columns=False,
        use_cpu=context.device == "cpu", dataloader_pin_memory=False, prediction_loss_only=True, label_names=[],
        restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the trainer copies the model to all GPUs of the machine
    tell = Tell()
    trainer = KlTrainer(
        model=model, args=arguments, train_dataset=samples[:whole], eval_dataset=samples[-held:],
        callbacks=[EarlyStoppingCallback(settings.patience), tell],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = False
    before = measure(module, samples[-held:], settings)
    last = context.group.tell(find_whole_checkpoint(folder))
    with context.progress("train", settings.steps, "step") as advance:
        if last is not None:
            advance(int(last.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=last)
    context.group.agree(None)  # nobody reads the checkpoints any more
    state = trainer.state
    if settings.weights == "lora":
        module = model.merge_and_unload()
    values = round_as_stored(module, names, graph)
    after = measure(module, samples[-held:], settings)
    curve = thin_out(state.log_history, settings.steps)
    best = int(str(state.best_model_checkpoint).rpartition("-")[2]) if after < before else 0
    return Trained(values if best else {}, before, after if best else before, best, state.global_step, trained, curve)


def mixed_loss(model: Any, inputs: Any, share: float) -> torch.Tensor:
    """Mean over positions of `share` times the KL to the original, and the rest of the loss on text."""
    from .sliced_loss import mean_by_slices

    ids, choices, logs = inputs["input_ids"], inputs["choices"].long(), inputs["logs"]

    def losses(logits: torch.Tensor, sequence: int, positions: slice) -> torch.Tensor:
        parts = []
        if share:
            parts.append(share * divergence_from(logits, choices[sequence, positions], logs[sequence, positions]))
        if share < 1:
            parts.append((1 - share) * loss_on(logits, ids[sequence, 1:][positions]))
        return sum(parts[1:], parts[0])

    return mean_by_slices(model(input_ids=ids, use_cache=False).logits, losses)


def measure(module: Any, samples: list[dict[str, torch.Tensor]], settings: TrainingSettings) -> float:
    """Mean loss of samples, each by itself."""
    import torch

    module.eval()
    device = next(module.parameters()).device
    with torch.no_grad():
        batches = ({name: part[None].to(device) for name, part in one.items()} for one in samples)
        losses = [float(mixed_loss(module, batch, settings.teacher_share)) for batch in batches]
    return sum(losses) / len(losses)


def add_lora(module: Any, names: dict[str, str], rank: int, alpha: int) -> Any:
    """The model with low-rank updates of the linear maps in its layers, which alone are open to training.

    `names`: parameters of layers that can be written. Raises `StageError` where there is no such map.
    """
    from peft import LoraConfig, get_peft_model

    from ..checkpoint.adapter import is_transposed, linear_classes

    head = module.get_output_embeddings()
    maps = [
        name
        for name, child in module.named_modules()
        if isinstance(child, linear_classes()) and child is not head and f"{name}.weight" in names
    ]
    if not maps:
        raise StageError("the model has no linear map that LoRA could change; set weights: all")
    conv = is_transposed(module.get_submodule(maps[0]))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=maps, fan_in_fan_out=conv)
    with warnings.catch_warnings():  # peft asks transformers by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model: Any = get_peft_model(module, config)
    model.peft_config["default"].base_model_name_or_path = ""  # no folder, and no model of the hub to be looked for
    return model


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


def find_whole_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint of the trainer that is whole."""
    whole = (file.parent for file in folder.glob(f"checkpoint-*/{_DONE}"))
    last = max(whole, key=lambda one: int(one.name.rpartition("-")[2]), default=None)
    return None if last is None else str(last)
