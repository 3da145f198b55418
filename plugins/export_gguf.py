"""Write the model as a GGUF file, with llama.cpp's own converter.

Source: https://github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py). The converter knows what llama.cpp
runs; it is used where the user has it, and never copied.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, Evaluation, Export, FolderExport, ModelGraph, OptionError, Stage, StageError, hookimpl
from gradmap_pipeline.folders import make_lineage, write_companions
from gradmap_pipeline.processes import explain_end, tie
from gradmap_pipeline.targets import describe_folder

CONVERTER = "convert_hf_to_gguf.py"
_MAGIC = b"GGUF"


class GgufFolder(Export):
    """A folder with one GGUF file, for llama.cpp and what is built on it. Nothing here runs it."""

    format: Literal["gguf"] = "gguf"
    type: str
    """Of its weights, by llama.cpp's name."""


class ExportGguf(FolderExport):
    """Write the model as a GGUF file for llama.cpp, with llama.cpp's own converter."""

    name = "export_gguf"
    libraries = ("safetensors",)

    type: Literal["f32", "f16", "bf16", "q8_0"] = Field("f16", description="Type of the weights in the file.")
    converter: Path | None = Field(
        None, description=f"Where llama.cpp's `{CONVERTER}` is. Default: the one that is found on the search path for programs."
    )
    python: Path | None = Field(
        None, description="Python to run the converter with, where its requirements are installed. Default: this one."
    )

    class Inputs(BaseModel):
        model: ModelGraph
        evaluation: Evaluation | None = None

    class Outputs(BaseModel):
        exported: GgufFolder

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        super().forecast(inputs)
        if self.python is not None and not self.python.is_file():
            raise OptionError("python", f"there is no file {str(self.python)!r}")
        self._find_converter()
        return {}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.model.checkpoint import write_folder
        from gradmap_pipeline.model.companions import find_licences

        graph = inputs.model
        evaluation = inputs.evaluation if inputs.evaluation and inputs.evaluation.model == graph.digest else None
        plain = context.folder / "plain"
        plain.mkdir()
        try:
            list(write_folder(graph.export_tensors(), plain, graph.dtype))
            write_companions(graph, plain)
            with self.new_folder(graph.base.folder) as new:
                partial = new.path
                self._convert(plain, partial / f"model-{self.type}.gguf")
                for licence in find_licences(graph.base.folder):
                    shutil.copyfile(licence, partial / licence.name)
                files = describe_folder(partial)
                files = new.finish(make_lineage(graph, evaluation, files, None, context), files)
        finally:
            shutil.rmtree(plain)
        context.note(f"wrote {self.to}: {sum(file.size for file in files.values()) / 1e6:.1f} MB, converted by llama.cpp, not run")
        return self.Outputs(exported=GgufFolder(graph=graph, folder=new.target, files=files, type=self.type))

    def _find_converter(self) -> Path:
        if self.converter is not None:
            found = self.converter / CONVERTER if self.converter.is_dir() else self.converter
            if not found.is_file():
                raise OptionError("converter", f"there is no file {str(found)!r}")
            return found
        on_path = shutil.which(CONVERTER)
        if on_path is None:
            raise OptionError(
                "converter",
                f"{CONVERTER} is not on the search path for programs; get llama.cpp (github.com/ggml-org/llama.cpp), install the "
                "requirements of its converter, and say where it is",
            )
        return Path(on_path)

    def _convert(self, folder: Path, file: Path) -> None:
        command = [str(self.python or sys.executable), str(self._find_converter()), str(folder)]
        done = subprocess.run(
            tie([*command, "--outfile", str(file), "--outtype", self.type]),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise explain_end("llama.cpp's converter", done.returncode, done.stderr or "it said nothing")
        if not file.is_file() or not file.open("rb").read(4) == _MAGIC:
            raise StageError("llama.cpp's converter ended without an error, and without a GGUF file; nothing was written")


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ExportGguf]
