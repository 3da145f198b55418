"""How many tokens the large model would accept from the pruned one, when that drafts for it.

Source: speculative decoding, https://arxiv.org/abs/2211.17192, equation 1 and theorem 3.5.
Sizes: B sequences a batch, T tokens, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    DatasetSource,
    Estimate,
    Forecasts,
    Measurement,
    Metric,
    ModelCosts,
    ModelGraph,
    Outlook,
    Stage,
    StageError,
    StructureProbe,
    check_length,
    count_embeddings,
    explain_nonfinite,
    hookimpl,
    known,
    load_tokenizer,
    make_sequences,
    open_sweep,
    predicted_tokens,
)

if TYPE_CHECKING:
    import torch


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens that a pass of the large model gives on average: Σ_{i ≤ n} a^i, n drafted, each accepted with probability a."""
    return float(sum(acceptance**power for power in range(drafted + 1)))


def acceptance(large: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Σ_x min(p(x), q(x)): the probability that a sampled token is accepted. Log-probabilities (…, V) of both; returns (…)."""
    return (large.float().exp()).minimum(draft.float().exp()).sum(-1)


def count_run(agrees: torch.Tensor, drafted: int) -> torch.Tensor:
    """How many of the `drafted` tokens from each position on agree before the first that does not.

    agrees: bool (T,). Returns int64 (T - drafted + 1,), for positions that have so many after them.
    """
    windows = agrees.long().unfold(0, drafted, 1)
    return windows.cumprod(-1).sum(-1)


class EvaluateDraft(Stage):
    """Measure how many tokens the unpruned model accepts when the model drafts for it, in greedy and in sampled decoding."""

    name = "evaluate_draft"
    libraries = ("torch", "transformers", "tokenizers", "datasets")
    metric_names = ("greedy tokens a pass", "sampled tokens a pass", "greedy agreement", "sampled acceptance", "KL divergence")

    dataset: DatasetSource = Field(description="Text whose tokens are drafted, each after those before it.")
    samples: int = Field(16, ge=1, description="Number of sequences, the first of the data set.")
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence. Default: as long as the model is made for, at most 2048."
    )
    packing: Literal["documents", "none"] = Field(
        "documents", description="`documents`: texts end to end in full sequences. `none`: one text a sequence, cut or padded."
    )
    draft_tokens: int = Field(5, ge=1, le=64, description="Tokens that are drafted before the large model checks them.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        measurement: Measurement

    def forecast(self, inputs: Forecasts) -> Outlook:
        self.dataset.check_amount(self.samples, check_length(self.sequence_length, inputs.of(ModelGraph)), self.packing)
        return {}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()
        base = probe.graph.base
        self.dataset.check_fits_tokenizer(lambda: load_tokenizer(base))
        length = self.sequence_length or base.default_sequence_length
        self.dataset.check_gives(self.samples, length, self.packing, lambda: load_tokenizer(base))

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        model = inputs.of(ModelGraph)
        length, whole = known(check_length(self.sequence_length, model)), len(costs.graph.layers)
        sweeps = costs.forward_sweep(whole, self.samples, length) + costs.forward_sweep(known(model.layers), self.samples, length)
        kept = 2 * self.samples * length * costs.words
        moving = kept * (costs.speed.write + costs.speed.read_again())
        return costs.text(self.samples * length) + sweeps + Estimate(0, kept, kept, seconds=moving, disk_bytes=kept)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model, base = inputs.model, inputs.model.base
        length = self.sequence_length or base.default_sequence_length
        tokenizer, embeddings = load_tokenizer(base), count_embeddings(base)
        documents = self.dataset.documents()
        samples = make_sequences(tokenizer, documents, length, self.samples, self.packing, embeddings=embeddings)
        with _scratch(context.folder / "log_probabilities") as folder:
            sums = self._compare(model, samples, folder, context)
        tokens = sums["tokens"]
        mean = {name: value / tokens for name, value in sums.items()}
        sampled = expected_tokens(mean["accepted"], self.draft_tokens)
        greedy = 1 + sums["run"] / sums["windows"] if sums["windows"] else expected_tokens(mean["agrees"], self.draft_tokens)
        context.note(
            f"of {self.draft_tokens} drafted tokens the unpruned model takes {greedy - 1:.2f} in greedy decoding and "
            f"{sampled - 1:.2f} when tokens are sampled, and adds one of its own"
        )
        setting = f"{samples[0].shape[0]} x {samples[0].shape[1]} tokens, {self.draft_tokens} drafted"
        figures = {
            "greedy tokens a pass": (greedy, "higher"),
            "sampled tokens a pass": (sampled, "higher"),
            "greedy agreement": (mean["agrees"], "higher"),
            "sampled acceptance": (mean["accepted"], "higher"),
            "KL divergence": (mean["divergence"], "lower"),
        }
        on = {"on": self.dataset.name, "on_option": "dataset", "setting": setting}
        metrics = tuple(Metric(name=name, value=value, better=better, **on) for name, (value, better) in figures.items())
        return self.Outputs(measurement=Measurement(model=model.digest, metrics=metrics))

    def _compare(
        self, model: ModelGraph, samples: tuple[torch.Tensor, torch.Tensor], folder: Path, context: Context
    ) -> dict[str, float]:
        """Sums over all tokens that are predicted; of runs, over all windows of drafted tokens that lie in a sequence."""
        from safetensors.torch import load_file, save_file

        sums = dict.fromkeys(("tokens", "agrees", "accepted", "divergence", "run", "windows"), 0.0)
        with open_sweep(model.dense, samples, context) as sweep:
            plan, batches = sweep.plan, sweep.batches
            units = len(batches) * (model.base.layers + 1)
            with context.progress("run the unpruned model", units, "layer batch") as sweep.advance:
                for number, logits in enumerate(sweep.logits()):
                    log = logits[:, :-1].float().log_softmax(-1)
                    kept = {"log": log.half().cpu(), "first": log.argmax(-1).cpu()}
                    save_file(kept, folder / f"{number}.safetensors")
        with open_sweep(model, samples, context, plan=plan) as sweep:
            units = len(batches) * (len(model.layers) + 1)
            with context.progress("run the draft model", units, "layer batch") as sweep.advance:
                for number, logits in enumerate(sweep.logits()):
                    file = folder / f"{number}.safetensors"
                    large = load_file(file)
                    file.unlink()
                    mask = predicted_tokens(batches[number]).cpu()
                    draft = logits[:, :-1].float().log_softmax(-1).cpu()
                    agrees = (draft.argmax(-1) == large["first"]) & mask
                    target = large["log"].float()
                    divergence = (target.exp() * (target - draft)).sum(-1)
                    sums["tokens"] += float(mask.sum())
                    sums["agrees"] += float(agrees.sum())
                    sums["accepted"] += float(acceptance(target, draft)[mask].double().sum())
                    sums["divergence"] += float(divergence[mask].double().sum())
                    for row, is_real in zip(agrees, mask, strict=True):
                        inside = row[is_real]
                        if len(inside) >= self.draft_tokens:
                            runs = count_run(inside, self.draft_tokens)
                            sums["run"] += float(runs.sum())
                            sums["windows"] += len(runs)
                if not math.isfinite(sum(sums.values())):
                    what = "what the models predict"
                    cause = explain_nonfinite(what, [model.dense, model], batches, context.device, context.dtype, context.folder)
                    raise cause or StageError(f"{what} is not a finite number")
        return sums


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is gone after the block."""
    import shutil

    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [EvaluateDraft]
