"""Round the weights of linear layers to 8 bits a row, and write a folder that plain transformers loads.

A row w becomes s · round(w / s) with s = max|w| / 127. The rounded values are stored in the type of the checkpoint: what
the folder shows is what rounding costs in quality; files do not shrink.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    FolderExport,
    Forecasts,
    ModelGraph,
    Outlook,
    Stage,
    TransformersFolder,
    hookimpl,
    load_folder,
    write_quantised,
)

if TYPE_CHECKING:
    import torch


class StageName(FolderExport):
    """Round the weights of linear layers to 8 bits, and write a folder that transformers loads."""

    name = "stage_name"
    libraries = ("torch", "transformers")

    head: bool = Field(False, description="Round the head, too, and with it the embeddings where both are one matrix.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        model: TransformersFolder

    def forecast(self, inputs: Forecasts) -> Outlook:
        return {**super().forecast(inputs), "model": TransformersFolder.Forecast.of(inputs.of(ModelGraph))}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        with self.new_folder(inputs.model.base.folder) as new:
            exported = write_quantised(inputs.model, new, "safetensors", "int8 rounded", self._quantise, self, context)
        return self.Outputs(model=exported)

    def _quantise(self, folder: Path) -> Any:
        import torch

        model = load_folder(folder)
        head = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and (self.head or module is not head):
                module.weight.data = round_rows(module.weight.data)
        model.tie_weights()
        return model


def round_rows(weight: torch.Tensor) -> torch.Tensor:
    """Each row (out, in) on 255 evenly spaced values around zero."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return ((wide / scale).round() * scale).to(weight.dtype)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [StageName]
