"""Measure perplexity on a text, and hold the model to limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    DatasetSource,
    Estimate,
    Evaluation,
    Export,
    Forecasts,
    Model,
    ModelCosts,
    ModelGraph,
    OptionError,
    Outlook,
    QualityError,
    Stage,
    StageError,
    StructureProbe,
    check_length,
    count_embeddings,
    count_predicted,
    digest_sequences,
    explain_nonfinite,
    find_nonfinite_weights,
    hookimpl,
    known,
    lengths_apart_in,
    load_tokenizer,
    make_batches,
    make_sequences,
    next_token_losses,
    open_sweep,
    perplexity_of,
)

if TYPE_CHECKING:
    import torch

_EXPORT_BATCH_TOKENS = 2048  # whose logits are in memory at once


class Evaluate(Stage):
    """Measure the perplexity of the model on a text, and stop the run when a limit is not met."""

    name = "evaluate"
    parallel = True
    metric_names = ("perplexity",)
    libraries = ("torch", "transformers", "tokenizers", "datasets")

    dataset: DatasetSource = Field(description="Text to predict.")
    samples: int | Literal["all"] = Field(128, description="Number of sequences, the first of the data set; or `all`.")
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence. Default: as long as the model is made for, at most 2048."
    )
    packing: Literal["documents", "none"] = Field(
        "documents", description="`documents`: texts end to end in full sequences. `none`: one text a sequence, cut or padded."
    )
    max_perplexity: float | None = Field(None, gt=1, description="Largest perplexity that passes.")
    max_perplexity_ratio: float | None = Field(
        None, gt=0, description="Largest perplexity that passes, relative to the unpruned model on the same text."
    )

    class Inputs(BaseModel):
        model: Model

    class Outputs(BaseModel):
        evaluation: Evaluation

    def forecast(self, inputs: Forecasts) -> Outlook:
        if isinstance(self.samples, int) and self.samples < 1:
            raise OptionError("samples", f"found {self.samples}; accepted: a whole number from 1, or all")
        model = inputs.of(Model)
        unusable = model.explain_unusable()
        if unusable is not None:
            raise OptionError("", unusable)
        length = check_length(self.sequence_length, model)
        if self.samples != "all":
            self.dataset.check_amount(self.samples, length, self.packing)
        return {}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()
        base = probe.graph.base
        self.dataset.check_fits_tokenizer(lambda: load_tokenizer(base))
        if self.samples != "all":
            length = self.sequence_length or base.default_sequence_length
            self.dataset.check_gives(self.samples, length, self.packing, lambda: load_tokenizer(base))

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        model = inputs.of(Model)
        if not inputs.has(ModelGraph) or self.samples == "all":
            return None  # another program runs it, or how long the text is shows when it is read
        layers, length = known(model.layers), known(check_length(self.sequence_length, model))
        whole = len(costs.graph.layers)
        text = (str(self.dataset), self.samples, length, self.packing)
        total = costs.text(self.samples * length)
        for depth in [layers] if self.max_perplexity_ratio is None else [layers, whole]:
            if depth != whole or costs.first_time(text):
                total += costs.forward_sweep(depth, self.samples, length)
        return total

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model = inputs.model
        graph = model.graph
        base = graph.base
        length = self.sequence_length or base.default_sequence_length
        samples = None if self.samples == "all" else self.samples
        tokenizer, embeddings = load_tokenizer(base), count_embeddings(base)
        ids, mask = make_sequences(tokenizer, self.dataset.documents(), length, samples, self.packing, embeddings=embeddings)
        text = digest_sequences(ids, mask)

        def measure(model: Model) -> dict[str, Any]:
            content = model.model_copy(update={"label": ""}) if isinstance(model, ModelGraph) else model
            key = {"model": content.content(), "text": text}
            score = partial(score_text, model) if isinstance(model, ModelGraph) else partial(score_opened, model)
            figures: dict[str, Any] = context.remember(key, lambda: score(ids, mask, context))
            return figures

        figures = measure(model)
        perplexity = perplexity_of(figures["loss"], self.dataset.name)
        base_perplexity = None
        if self.max_perplexity_ratio is not None:
            base_perplexity = perplexity_of(measure(graph.dense)["loss"], self.dataset.name)
        self._check_limits(perplexity, base_perplexity)
        return self.Outputs(
            evaluation=Evaluation(
                model=model.digest,
                label=model.label,
                dataset=self.dataset.name,
                perplexity=perplexity,
                samples=ids.shape[0],
                sequence_length=ids.shape[1],
                packing=self.packing,
                layers=len(graph.layers),
                parameters=graph.count_parameters(),
                bytes=model.size_bytes,
                base_perplexity=base_perplexity,
                **figures,
            )
        )

    def _check_limits(self, perplexity: float, base_perplexity: float | None) -> None:
        missed = []
        if self.max_perplexity is not None and not perplexity <= self.max_perplexity:
            missed.append(f"perplexity {perplexity:.4g} on {self.dataset.name!r} is over max_perplexity {self.max_perplexity:g}")
        if self.max_perplexity_ratio is not None and base_perplexity is not None:
            ratio = perplexity / base_perplexity
            if not ratio <= self.max_perplexity_ratio:
                missed.append(
                    f"perplexity {perplexity:.4g} on {self.dataset.name!r} is {ratio:.3f} times that of the unpruned model "
                    f"({base_perplexity:.4g}), over max_perplexity_ratio {self.max_perplexity_ratio:g}"
                )
        if missed:
            raise QualityError("; ".join(missed) + "; remove fewer layers, calibrate on more text, or raise the limit")


def score_text(model: ModelGraph, ids: torch.Tensor, mask: torch.Tensor, context: Context) -> dict[str, Any]:
    """Mean next-token loss in nats over all tokens that are predicted, each once, and their number. ids, mask (samples, tokens)."""
    loss = 0.0
    with open_sweep(model, (ids, mask), context) as sweep:
        batches = sweep.batches
        units = len(batches) * (len(model.layers) + 1)
        with context.progress(f"score text with the {model.label} model", units, "") as sweep.advance:
            loss += sum(float(losses.double().sum()) for losses in sweep.losses())
    total = context.group.sum_values({"loss": loss, "tokens": count_predicted(batches)})
    if not math.isfinite(total["loss"]):
        what = f"the loss of the {model.label} model"
        cause = explain_nonfinite(what, [model], batches, context.device, context.dtype, context.folder)
        context.group.agree(cause or StageError(f"{what} is not a finite number"), is_vague=cause is None)
    return _mean_loss(total)


def score_opened(model: Model, ids: torch.Tensor, mask: torch.Tensor, context: Context) -> dict[str, Any]:
    """Mean next-token loss of a model in another form, by the program that `open` of its class starts."""
    apart = lengths_apart_in(model.graph.base.folder)
    batches = make_batches(context.group.share(ids), context.group.share(mask), _EXPORT_BATCH_TOKENS, lengths_apart=apart)
    run = model.open(context.device)
    loss = 0.0
    with context.progress(f"score text with the {model.label} model", len(batches), "") as advance:
        for batch in batches:
            loss += float(next_token_losses(run(batch), batch).double().sum())
            advance()
    total = context.group.sum_values({"loss": loss, "tokens": count_predicted(batches)})
    if not math.isfinite(total["loss"]):
        cause = (
            find_nonfinite_weights(model.graph)
            or "its weights are finite, what it computes in its own types is not; export it in float32"
        )
        place = f" in {str(model.folder)!r}" if isinstance(model, Export) else ""
        raise StageError(f"the loss of the {model.label} model{place} is not a finite number: {cause}")
    return _mean_loss(total)


def _mean_loss(total: Mapping[str, float]) -> dict[str, Any]:
    if not total["tokens"]:
        raise StageError("no token is predicted: each text is one token long; use longer texts, or `packing: documents`")
    return {"loss": total["loss"] / total["tokens"], "tokens": int(total["tokens"])}


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Evaluate]
