"""Draw a calibration set."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    SHUFFLE_POOL,
    CalibrationForecast,
    CalibrationSet,
    CalibrationSource,
    Context,
    Estimate,
    Forecasts,
    ModelCosts,
    ModelGraph,
    Outlook,
    Stage,
    StructureProbe,
    TensorFile,
    check_length,
    draw_samples,
    hookimpl,
    known,
    load_tokenizer,
)


class Calibrate(Stage):
    """Draw the token ids on which layers are scored and corrections are fitted."""

    name = "calibrate"
    libraries = ("torch", "transformers", "tokenizers", "datasets")

    dataset: CalibrationSource = Field(description="Text to draw from.")
    samples: int = Field(128, ge=1, description="Number of sequences.")
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence. Default: as long as the model is made for, at most 2048."
    )
    packing: Literal["documents", "none"] = Field(
        "documents", description="`documents`: texts end to end in full sequences. `none`: one text a sequence, cut or padded."
    )
    shuffle: bool = Field(True, description="Draw sequences at random (by the recipe's seed) instead of taking the first.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        calibration: CalibrationSet

    def forecast(self, inputs: Forecasts) -> Outlook:
        length = check_length(self.sequence_length, inputs.of(ModelGraph))
        self.dataset.check_amount(self.samples, length, self.packing)
        return {"calibration": CalibrationForecast(samples=self.samples, sequence_length=length)}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        base = probe.graph.base
        self.dataset.check_fits_tokenizer(lambda: load_tokenizer(base))
        length = self.sequence_length or base.default_sequence_length
        self.dataset.check_gives(self.samples, length, self.packing, lambda: load_tokenizer(base), is_shuffled=self.shuffle)

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        length = known(check_length(self.sequence_length, inputs.of(ModelGraph)))
        layers = known(inputs.of(ModelGraph).layers)
        return costs.drawn_text(self.dataset, self.samples, length, layers, SHUFFLE_POOL if self.shuffle else 1)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        import torch

        base = inputs.model.base
        length = self.sequence_length or base.default_sequence_length
        drawn = draw_samples(self.dataset, inputs.model, length, self.samples, self.packing, context, shuffle=self.shuffle)
        input_ids, mask, parts = drawn
        tensors = {"input_ids": input_ids.to(torch.int32), "attention_mask": mask.to(torch.uint8)}
        return self.Outputs(
            calibration=CalibrationSet(
                tensors=TensorFile.save(tensors, context.folder / "tokens.safetensors"),
                samples=input_ids.shape[0],
                sequence_length=input_ids.shape[1],
                tokens=int(mask.sum()),
                tokenizer=base.tokenizer_sha256,
                source=self.dataset.name,
                parts=parts,
            )
        )


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Calibrate]
