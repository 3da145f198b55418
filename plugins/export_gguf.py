"""Write the model as a GGUF file, with llama.cpp's own converter.

Source: https://github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py). The converter knows what llama.cpp
runs; it is used where the user has it, and never copied.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    ExportableModel,
    FolderExport,
    Forecasts,
    GgufConverter,
    GgufFolder,
    Outlook,
    Stage,
    StructureProbe,
    describe_folder,
    find_deviations,
    full_config,
    hookimpl,
    make_lineage,
    take_graph,
    write_card,
)


class ExportGguf(FolderExport):
    """Write the model as a GGUF file for llama.cpp, with llama.cpp's own converter, and run it beside the model."""

    name = "export_gguf"
    libraries = ("safetensors",)

    type: Literal["f32", "f16", "bf16", "q8_0"] = Field("f16", description="Type of the weights in the file.")
    converter: Path | None = Field(
        None,
        description="Where llama.cpp's `convert_hf_to_gguf.py` is. Default: the one that is found on the search path for programs.",
    )
    python: Path | None = Field(
        None,
        description="Python to run the converter with, where its requirements are installed; with llama-cpp-python there, it "
        "runs the file, too. Default: this one.",
    )

    class Inputs(BaseModel):
        model: ExportableModel

    class Outputs(BaseModel):
        exported: GgufFolder

    def forecast(self, inputs: Forecasts) -> Outlook:
        super().forecast(inputs)
        model = inputs.of(ExportableModel)
        self._converter.check(model)
        python = self._converter.runner or str(self.python or sys.executable)
        return {"exported": GgufFolder.Forecast.of(model, type=self.type, quantisation=self._quantisation, python=python)}

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        return () if self._converter.runner else (self._converter.explain_no_runner(),)

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        super().inspect(inputs, probe)
        kept = inputs.of(ExportableModel).kept
        if kept is not None:
            self._converter.prune_config(full_config(probe.graph.base.folder), kept)
        self._converter.check_whole(probe.graph)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        graph = take_graph(inputs.model, context)
        config = self._converter.prune_config(full_config(graph.base.folder), graph.layers)
        runner = self._converter.runner
        with self.new_folder(graph.base.folder) as new:
            file = new.path / f"model-{self.type}.gguf"
            arrays = self._converter.write_file(graph, file, self.type, config, context)
            parity = None if runner is None else self._converter.run_file(graph, file, self.type, runner, context)
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
        context.note(f"wrote {self.to}{new.replaced}: {size:.1f} MB of files, {parity or self._converter.explain_no_runner()}")
        made: dict[str, Any] = {"graph": graph, "folder": new.target, "files": files, "max_logit_difference": difference}
        made["quantisation"] = self._quantisation
        return self.Outputs(exported=GgufFolder(**made, type=self.type, python=runner))

    @property
    def _quantisation(self) -> str | None:
        return self.type if self.type == "q8_0" else None

    @property
    def _converter(self) -> GgufConverter:
        return GgufConverter(self.converter, self.python)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ExportGguf]
