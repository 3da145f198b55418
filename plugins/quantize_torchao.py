"""Quantise weights to 8 bits with torchao, through transformers' own config, so that plain `from_pretrained` loads the result.

Source: https://github.com/pytorch/ao and https://huggingface.co/docs/transformers/quantization/torchao
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    FolderExport,
    Forecasts,
    ModelGraph,
    Outlook,
    Stage,
    TransformersFolder,
    explain_forecast,
    hookimpl,
    load_folder,
    write_quantised,
)


class QuantizeTorchao(FolderExport):
    """Quantise linear layers to int8 with torchao; plain transformers loads the folder where torchao is installed."""

    name = "quantize_torchao"
    requires = ("torchao", "accelerate")
    extra = "torchao"
    libraries = ("torch", "transformers", "torchao")

    method: Literal["int8", "int8_dynamic"] = Field(
        "int8",
        description="`int8`: weights alone, by output channel. `int8_dynamic`: activations too, a scale for each token (W8A8).",
    )

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        model: TransformersFolder

    def forecast(self, inputs: Forecasts) -> Outlook:
        return {
            **super().forecast(inputs),
            "model": TransformersFolder.Forecast.of(inputs.of(ModelGraph), quantisation=self._label),
        }

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        return explain_forecast(inputs.of(ModelGraph))

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        def quantise(folder: Path) -> Any:
            return load_folder(folder, quantization_config=self._config())

        with self.new_folder(inputs.model.base.folder) as new:
            exported = write_quantised(inputs.model, new, "torchao", self._label, quantise, self, context)
        return self.Outputs(model=exported)

    @property
    def _label(self) -> str:
        return f"{self.method} torchao"

    def _config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if self.method == "int8" else Int8DynamicActivationInt8WeightConfig())


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [QuantizeTorchao]
