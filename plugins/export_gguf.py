"""Write the model as a GGUF file, with llama.cpp's own converter.

Source: https://github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py). The converter knows what llama.cpp
runs; it is used where the user has it, and never copied.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    FolderExport,
    Forecasts,
    GgufFolder,
    ModelGraph,
    OptionError,
    Outlook,
    Stage,
    StageError,
    StructureProbe,
    hookimpl,
)
from gradmap_pipeline.export.folders import find_deviations, make_lineage, write_card, write_companions
from gradmap_pipeline.export.llamacpp import pythons
from gradmap_pipeline.machine.processes import explain_end, tie
from gradmap_pipeline.stages.targets import describe_folder

if TYPE_CHECKING:
    from gradmap_pipeline.export.llamacpp.parity import Parity

CONVERTER = "convert_hf_to_gguf.py"
_MAGIC = b"GGUF"
_SIZE = re.compile(r"-(a|\d+x)?\d+([._]\d+)?[kmbt]\d?(?=-|$)", re.IGNORECASE)
"""The size in a model's name: `-135M`, `-8x7B`."""


class ExportGguf(FolderExport):
    """Write the model as a GGUF file for llama.cpp, with llama.cpp's own converter, and run it beside the model."""

    name = "export_gguf"
    libraries = ("safetensors",)

    type: Literal["f32", "f16", "bf16", "q8_0"] = Field("f16", description="Type of the weights in the file.")
    converter: Path | None = Field(
        None, description=f"Where llama.cpp's `{CONVERTER}` is. Default: the one that is found on the search path for programs."
    )
    python: Path | None = Field(
        None,
        description="Python to run the converter with, where its requirements are installed; with llama-cpp-python there, it "
        "runs the file, too. Default: this one.",
    )

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        exported: GgufFolder

    def forecast(self, inputs: Forecasts) -> Outlook:
        super().forecast(inputs)
        pythons.check_program("python", self.python)
        converter = self._find_converter()
        model = inputs.of(ModelGraph)
        missing = pythons.explain_missing(self._python, converter)
        if missing is not None:
            raise OptionError("python", missing)
        if model.config is not None and model.kept is not None:
            self._check_config(model.config, model.kept)
        for architecture in (model.config or {}).get("architectures") or ():
            if not pythons.knows(converter, architecture):
                raise OptionError("converter", f"llama.cpp's converter does not know {architecture}; export in another format")
        python = self._find_runner() or self._python
        return {"exported": GgufFolder.Forecast.of(model, type=self.type, quantisation=self._quantisation, python=python)}

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        return () if self._find_runner() else (pythons.explain_no_runner(self._python),)

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        from gradmap_pipeline.checkpoint.architecture import full_config
        from gradmap_pipeline.export.llamacpp.dry_run import explain_failure

        super().inspect(inputs, probe)
        kept = inputs.of(ModelGraph).kept
        if kept is not None:
            self._check_config(full_config(probe.graph.base.folder), kept)
        failure = explain_failure(probe.graph, self._find_converter(), self._python)
        if failure is not None:
            raise OptionError("converter", f"{failure}; export in another format")

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.checkpoint.architecture import full_config
        from gradmap_pipeline.checkpoint.companions import find_licences

        graph = inputs.model
        config = self._check_config(full_config(graph.base.folder), graph.layers)
        runner = self._find_runner()
        with self.new_folder(graph.base.folder) as new:
            file = new.path / f"model-{self.type}.gguf"
            arrays = self._write_file(graph, file, config, context)
            parity = None if runner is None else self._run_file(graph, file, runner, context)
            for licence in find_licences(graph.base.folder):
                shutil.copyfile(licence, new.path / licence.name)
            details = () if parity is None else (f"beside the model before quantisation: {parity}",)
            write_card(new.path, graph, context.metrics, "gguf", self._quantisation and self.type.upper(), details)
            files = describe_folder(new.path)
            difference = None if parity is None else parity.difference
            lineage = make_lineage(graph, files, difference, self, context)
            files = new.finish(lineage | {"llama_cpp": None if parity is None else parity.as_json()}, files)
        if arrays:
            context.note(f"the file lists {', '.join(arrays)}, which llama.cpp would place by a period")
        for deviation in find_deviations(graph, "gguf"):
            context.note(deviation)
        size = sum(written.size for written in files.values()) / 1e6
        context.note(f"wrote {self.to}: {size:.1f} MB, {parity or pythons.explain_no_runner(self._python)}")
        made: dict[str, Any] = {"graph": graph, "folder": new.target, "files": files, "max_logit_difference": difference}
        made["quantisation"] = self._quantisation
        return self.Outputs(exported=GgufFolder(**made, type=self.type, python=runner))

    def _check_config(self, config: Mapping[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
        """The config of what is left. Raises `OptionError` where llama.cpp would compute another model, whatever the file says."""
        from gradmap_pipeline.checkpoint.depth import prune_fields
        from gradmap_pipeline.errors import ModelError
        from gradmap_pipeline.export.llamacpp.limits import explain_refusal

        try:
            left = prune_fields(dict(config), dict(config), kept)
        except ModelError:  # refused where layers are removed
            return dict(config)
        reason = explain_refusal(left)
        if reason is not None:
            raise OptionError("to", f"{reason}; export in another format")
        return left

    def _run_file(self, graph: ModelGraph, file: Path, runner: str, context: Context) -> Parity:
        from gradmap_pipeline.export.llamacpp.parity import measure_parity

        with context.progress("run the GGUF file", 1, "file") as advance:
            parity = measure_parity(graph, file, self.type, runner, context.seed)
            advance()
        return parity

    @property
    def _quantisation(self) -> str | None:
        return self.type if self.type == "q8_0" else None

    @property
    def _python(self) -> str:
        return str(self.python or sys.executable)

    def _find_runner(self) -> str | None:
        return pythons.find_runner((self._python, sys.executable))

    def _find_converter(self) -> Path:
        if self.converter is not None:
            found = self.converter / CONVERTER if self.converter.is_dir() else self.converter
            pythons.check_converter(found)
            return found
        on_path = shutil.which(CONVERTER)
        if on_path is None:
            raise OptionError(
                "converter",
                f"{CONVERTER} is not on the search path for programs: git clone https://github.com/ggml-org/llama.cpp, and set "
                "`converter: llama.cpp`",
            )
        return Path(on_path)

    def _write_file(self, graph: ModelGraph, file: Path, config: Mapping[str, Any], context: Context) -> list[str]:
        """Write a checkpoint for the converter, and the file from it; return the keys that the file has besides the converter's."""
        from gradmap_pipeline.checkpoint.checkpoint import write_folder

        name = Path(graph.base.name if graph.base.from_hub else graph.base.folder.resolve()).name
        scratch = context.folder / "plain"
        plain = scratch / _SIZE.sub("", name)  # what the converter takes basename and size from; that of what is left it counts
        plain.mkdir(parents=True)
        try:
            list(write_folder(graph.export_tensors(), plain, graph.dtype))
            write_companions(graph, plain)
            return self._convert(plain, file, config, name)
        finally:
            shutil.rmtree(scratch)

    def _convert(self, folder: Path, file: Path, config: Mapping[str, Any], name: str) -> list[str]:
        """Write the file, which names the model so; return the keys that it has besides those of the converter."""
        from gradmap_pipeline.export.llamacpp.limits import find_arrays

        arrays = find_arrays(config)
        made = file.with_name(f"converted-{file.name}") if arrays else file
        converter = self._find_converter()
        options = ["--outfile", str(made), "--outtype", self.type]
        if pythons.takes_name(converter):
            options.append(f"{pythons.NAME_OPTION}={name}")  # one word, as a name may start with a hyphen
        self._start("llama.cpp's converter", str(converter), str(folder), *options)
        if not made.is_file() or not _starts_as_gguf(made):
            raise StageError("llama.cpp's converter ended without an error, and without a GGUF file; nothing was written")
        if arrays:
            self._start(
                "rewriting the GGUF file",
                str(pythons.REWRITER),
                str(made),
                str(file),
                json.dumps(arrays),
                *pythons.find_modules(converter),
            )
            made.unlink()
        return list(arrays)

    def _start(self, name: str, *arguments: str) -> None:
        done = subprocess.run(tie([self._python, *arguments]), capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise explain_end(name, done.returncode, done.stderr or "it said nothing")


def _starts_as_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ExportGguf]
