"""Quantise weights to 8 bits with torchao, through transformers' own config, so that plain `from_pretrained` loads the result.

Source: https://github.com/pytorch/ao and https://huggingface.co/docs/transformers/quantization/torchao
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, ModelGraph, Stage, TransformersFolder, hookimpl
from gradmap_pipeline.exports import load_folder
from gradmap_pipeline.folders import check_target
from gradmap_pipeline.quantised import write_quantised


class QuantizeTorchao(Stage):
    """Quantise linear layers to int8 with torchao; plain transformers loads the folder where torchao is installed."""

    name = "quantize_torchao"
    requires = ("torchao", "accelerate")
    extra = "torchao"
    libraries = ("torch", "transformers", "torchao")

    method: Literal["int8", "int8_dynamic"] = Field(
        "int8",
        description="`int8`: weights alone, by output channel. `int8_dynamic`: activations too, a scale for each token (W8A8).",
    )
    to: Path = Field(description="Folder to write.")
    overwrite: bool = Field(False, description="Replace a folder even if it is not an earlier export.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        model: TransformersFolder

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        check_target(self.to, self.overwrite)
        return {"model": inputs.get("model")}

    def writes(self) -> tuple[Path, ...]:
        return (self.to,)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        def quantise(folder: Path) -> Any:
            return load_folder(folder, quantization_config=self._config())

        return self.Outputs(model=write_quantised(inputs.model, self.to, f"{self.method} torchao", quantise, context))

    def _config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if self.method == "int8" else Int8DynamicActivationInt8WeightConfig())


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [QuantizeTorchao]
