"""Measure how often the token that a model finds most likely is the next one of a text."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    DatasetSource,
    Forecasts,
    Measurement,
    Metric,
    ModelGraph,
    Outlook,
    Stage,
    StageError,
    StructureProbe,
    count_embeddings,
    hookimpl,
    load_tokenizer,
    make_sequences,
    open_sweep,
    predicted_tokens,
)


class StageName(Stage):
    """Measure how often the model's first choice is the next token of a text."""

    name = "stage_name"
    metric_names = ("accuracy",)
    libraries = ("torch", "transformers", "tokenizers", "datasets")

    dataset: DatasetSource = Field(description="Text to predict.")
    samples: int = Field(128, ge=1, description="Number of sequences, the first of the data set.")
    sequence_length: int = Field(256, ge=2, description="Tokens in a sequence.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        measurement: Measurement

    def forecast(self, inputs: Forecasts) -> Outlook:
        self.dataset.check_amount(self.samples, self.sequence_length, "documents")
        return {}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        base = inputs.model.base
        tokenizer, embeddings = load_tokenizer(base), count_embeddings(base)
        documents = self.dataset.documents()
        ids, mask = make_sequences(tokenizer, documents, self.sequence_length, self.samples, embeddings=embeddings)
        right = tokens = 0
        with (
            open_sweep(inputs.model, (ids, mask), context) as sweep,
            context.progress("predict text", len(sweep.batches), "batch") as advance,
        ):
            for batch, logits in zip(sweep.batches, sweep.logits(), strict=True):
                if not logits.isfinite().all():
                    raise StageError("the model computes logits that are not finite; use another --dtype")
                hit = logits[:, :-1].argmax(dim=-1).cpu() == batch.input_ids[:, 1:].cpu()
                counted = predicted_tokens(batch).cpu()
                right += int((hit & counted).sum())
                tokens += int(counted.sum())
                advance()
        accuracy = right / tokens
        context.note(f"the first choice is right for {accuracy:.1%} of {tokens} tokens of {self.dataset.name}")
        metric = Metric(
            name="accuracy",
            value=accuracy,
            better="higher",
            stderr=(accuracy * (1 - accuracy) / tokens) ** 0.5,
            on=self.dataset.name,
            on_option="dataset",
            setting=f"{self.samples} x {self.sequence_length} tokens",
        )
        return self.Outputs(measurement=Measurement(model=inputs.model.digest, metrics=(metric,)))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [StageName]
