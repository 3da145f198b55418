"""Quantise weights to 8 bits with torchao, through transformers' own config, so that plain `from_pretrained` loads the result.

Source: https://github.com/pytorch/ao and https://huggingface.co/docs/transformers/quantization/torchao
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, FolderExport, ModelGraph, Stage, TransformersFolder, hookimpl
from gradmap_pipeline.export.consumers import explain_forecast
from gradmap_pipeline.export.exports import load_folder
from gradmap_pipeline.export.quantised import write_quantised


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

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**super().forecast(inputs), "model": inputs.get("model")}

    def advise(self, inputs: Mapping[str, Any]) -> Sequence[str]:
        return explain_forecast(inputs.get("model"))

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        def quantise(folder: Path) -> Any:
            return load_folder(folder, quantization_config=self._config())

        with self.new_folder(inputs.model.base.folder) as new:
            exported = write_quantised(inputs.model, new, "torchao", f"{self.method} torchao", quantise, self, context)
        return self.Outputs(model=exported)

    def _config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if self.method == "int8" else Int8DynamicActivationInt8WeightConfig())


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [QuantizeTorchao]
