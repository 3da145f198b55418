"""Write a model as a folder that other programs load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gradmap_pipeline import (
    Artifact,
    Context,
    Estimate,
    ExportableModel,
    ExportedFile,
    FolderExport,
    Forecasts,
    ModelCosts,
    ModelGraph,
    OnnxFolder,
    OptionError,
    Outlook,
    Stage,
    StageError,
    StructureProbe,
    TransformersFolder,
    check_export,
    check_onnx_exportable,
    estimate_tracing_memory,
    explain_config,
    explain_forecast,
    explain_missing,
    explain_removal,
    find_deviations,
    full_config,
    hookimpl,
    known,
    lack_of_memory,
    make_lineage,
    take_graph,
    write_onnx_folder,
    write_transformers_folder,
)

_CHECK_SHAPE = (2, 48)  # sequences, tokens


class OnnxOptions(BaseModel):
    """Options of the ONNX format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["float32", "float16"] = Field("float32", description="Floating-point type of weights and activations.")
    layout: Literal["flat", "onnx"] = Field(
        "flat",
        description="`flat`: `model.onnx` beside config.json, for ONNX Runtime, Optimum and ONNX Runtime GenAI. `onnx`: in a "
        "folder of that name, where transformers.js looks for it; the others find it there too.",
    )


class ExportModel(FolderExport):
    """Write the model as a folder that other programs load, and check it by loading it back."""

    name = "export"

    format: Literal["safetensors", "onnx"] = Field(
        "safetensors",
        description="`safetensors`: a Hugging Face folder. `onnx`: one graph with a cache of keys and "
        "values, for ONNX Runtime, Optimum, ONNX Runtime GenAI and transformers.js.",
    )
    max_shard_gigabytes: float = Field(5.0, gt=0, description="Size of the largest weights file, in 10⁹ bytes.")
    programs: tuple[Literal["llama.cpp", "mlx-lm", "SGLang", "vLLM"], ...] = Field(
        (),
        description="Programs that must read the folder as it is meant: where one of them is known to place other kinds of layers "
        "than the model has, the step is refused rather than its note printed.",
    )
    onnx: OnnxOptions = Field(default_factory=OnnxOptions, description="Options of `format: onnx`.")

    class Inputs(BaseModel):
        model: ExportableModel

    class Outputs(BaseModel):
        exported: TransformersFolder | OnnxFolder = Field(discriminator="format")

    @model_validator(mode="after")
    def _check_combinations(self) -> ExportModel:
        if self.format != "onnx" and "onnx" in self.model_fields_set:
            raise ValueError(f"'onnx' belongs to format 'onnx'; the format is {self.format!r}")
        if self.format == "onnx" and "max_shard_gigabytes" in self.model_fields_set:
            raise ValueError("'max_shard_gigabytes' belongs to format 'safetensors'; an ONNX graph has one file of weights")
        if self.format == "onnx" and self.programs:
            raise ValueError("'programs' belongs to format 'safetensors'; an ONNX graph holds its layers itself")
        return self

    def output_types(self) -> dict[str, type[Artifact]]:
        return {"exported": OnnxFolder if self.format == "onnx" else TransformersFolder}

    def forecast(self, inputs: Forecasts) -> Outlook:
        super().forecast(inputs)
        if self.format == "onnx":
            missing = explain_missing(("onnxscript", "onnxruntime"), "onnx")
            if missing is not None:
                raise OptionError("format", missing)
        return {"exported": TransformersFolder.Forecast.of(inputs.of(ExportableModel))}

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        return explain_forecast(inputs.of(ExportableModel)) if self.format == "safetensors" else ()

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        super().inspect(inputs, probe)
        probe.check_layerwise()
        refusal = self._explain_refusal(explain_forecast(inputs.of(ExportableModel), self.programs))
        if refusal is not None:
            raise OptionError("programs", refusal)
        if self.format == "onnx":
            check_onnx_exportable(probe.graph)

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        layers = known(inputs.of(ExportableModel).layers)
        size = costs.count_bytes(layers)
        speed = costs.speed
        if self.format == "onnx":
            weights = costs.count_parameters(layers) * (4 if self.onnx.dtype == "float32" else 2)
            needed = estimate_tracing_memory(weights, costs.program_bytes)
            if needed > costs.memory:
                raise lack_of_memory(
                    f"tracing holds the weights once and a second program: {needed / 2**30:.2f} GiB, over the "
                    f"{costs.memory / 2**30:.2f} GiB allowed",
                    needed,
                    ["use `onnx: {dtype: float16}`"] if self.onnx.dtype == "float32" else [],
                )
            moving = size * speed.read_again(size) + weights * (speed.digest + 2 * speed.write)
            return Estimate(needed, size, weights, seconds=moving, how="seconds without those of tracing")
        copying = Estimate(0, size, size, seconds=size * (speed.read_again(size) + speed.digest + speed.write))
        return copying + costs.forward_sweep(layers, *_CHECK_SHAPE, besides=size) * 2

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model = take_graph(inputs.model, context)
        refusal = self._explain_refusal(explain_removal(full_config(model.base.folder), model.layers, self.programs))
        if refusal is not None:
            raise StageError(refusal)
        with self.new_folder(model.base.folder) as new:
            if self.format == "onnx":
                files, difference = self._write_onnx(model, new.path, context)
            else:
                files = self._write(model, new.path, context)
                difference = check_export(model, new.path, context, _CHECK_SHAPE)
            files = new.finish(make_lineage(model, files, difference, self, context), files)
        made: dict[str, Any] = {"graph": model, "folder": new.target, "files": files, "max_logit_difference": difference}
        size = sum(file.size for file in files.values()) / 1e6
        for line in explain_config(model, with_types=self.format != "onnx"):
            context.note(line)
        if self.format == "onnx":
            context.note(
                f"wrote {self.to}{new.replaced}: {size:.1f} MB of files, run beside the model, logits equal to {difference:.1e}"
            )
            return self.Outputs(exported=OnnxFolder(**made, dtype=self.onnx.dtype))
        for deviation in find_deviations(model, self.format):
            context.note(deviation)
        context.note(f"wrote {self.to}{new.replaced}: {size:.1f} MB of files, loaded back, logits equal")
        return self.Outputs(exported=TransformersFolder(**made))

    @staticmethod
    def _explain_refusal(misreadings: Sequence[str]) -> str | None:
        """What to do where programs that must read the folder would compute another model; None where none would."""
        if not misreadings:
            return None
        return (
            f"{'; '.join(misreadings)}; choose layers with `prune: {{among: regular}}`, which leaves the pattern as it is, or "
            "leave the program out of 'programs'"
        )

    def _write_onnx(self, model: ModelGraph, folder: Path, context: Context) -> tuple[dict[str, ExportedFile], float]:
        return write_onnx_folder(model, folder, self.onnx.dtype, self.onnx.layout, context)

    def _write(self, model: ModelGraph, folder: Path, context: Context) -> dict[str, ExportedFile]:
        return write_transformers_folder(model, folder, context, shard_bytes=int(self.max_shard_gigabytes * 1e9))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ExportModel]
