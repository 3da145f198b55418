"""Write a model as a folder of NumPy arrays, one file a tensor, with config and tokenizer beside them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    Export,
    FolderExport,
    ModelGraph,
    Stage,
    describe_folder,
    hookimpl,
    load_tensor,
    make_lineage,
    write_companions,
)


class NumpyFolder(Export):
    """A folder of NumPy arrays."""

    format: Literal["numpy"] = "numpy"

    @property
    def format_name(self) -> str:
        return "NumPy"

    @property
    def size_bytes(self) -> int:
        return sum(file.size for name, file in self.files.items() if name.endswith(".npy"))


class StageName(FolderExport):
    """Write a model as a folder of NumPy arrays."""

    name = "stage_name"
    libraries = ("torch", "numpy")

    dtype: Literal["float32", "float16"] = Field("float32", description="Type of the arrays.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        exported: NumpyFolder

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        import numpy
        import torch

        model = inputs.model
        tensors = model.export_tensors()
        with self.new_folder(model.base.folder) as new:
            with context.progress("write arrays", len(tensors), "tensor") as advance:
                for name, tensor in tensors.items():
                    numpy.save(new.path / f"{name}.npy", load_tensor(tensor).to(getattr(torch, self.dtype)).numpy())
                    advance()
            write_companions(model, new.path)
            files = describe_folder(new.path)
            files = new.finish(make_lineage(model, files, None, self, context), files)
        context.note(f"wrote {self.to}: {len(tensors)} arrays of {self.dtype}")
        return self.Outputs(exported=NumpyFolder(graph=model, folder=new.target, files=files))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [StageName]
