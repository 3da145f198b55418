"""Write a model as a folder that other programs load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gradmap_pipeline import (
    Artifact,
    CapacityError,
    Context,
    Estimate,
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
    hookimpl,
    known,
)
from gradmap_pipeline.export.consumers import explain_forecast, explain_removal
from gradmap_pipeline.export.folders import (
    check_loading,
    explain_config,
    find_deviations,
    make_lineage,
    write_card,
    write_companions,
)
from gradmap_pipeline.machine.extras import explain_missing
from gradmap_pipeline.stages.targets import describe_folder

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
        model: ModelGraph

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
        return {"exported": TransformersFolder.Forecast.of(inputs.of(ModelGraph))}

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        return explain_forecast(inputs.of(ModelGraph)) if self.format == "safetensors" else ()

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        super().inspect(inputs, probe)
        probe.check_layerwise()
        refusal = self._explain_refusal(explain_forecast(inputs.of(ModelGraph), self.programs))
        if refusal is not None:
            raise OptionError("programs", refusal)
        if self.format == "onnx":
            from gradmap_pipeline.checkpoint.pretrained import read_config
            from gradmap_pipeline.export.ort.trace import check_exportable

            check_exportable(read_config(probe.graph.base.folder))

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        layers = known(inputs.of(ModelGraph).layers)
        size = costs.count_bytes(layers)
        rates = costs.speed
        if self.format == "onnx":
            from gradmap_pipeline.export.ort.apart import estimate_memory

            weights = costs.count_parameters(layers) * (4 if self.onnx.dtype == "float32" else 2)
            needed = estimate_memory(weights, costs.program_bytes)
            if needed > costs.memory:
                raise CapacityError(
                    f"tracing holds the weights once and a second program: {needed / 2**30:.2f} GiB, over the "
                    f"{costs.memory / 2**30:.2f} GiB allowed; use `onnx: {{dtype: float16}}`, or allow more with --memory"
                )
            moving = size * rates.read_again(size) + weights * (rates.digest + 2 * rates.write)
            return Estimate(needed, size, weights, seconds=moving, how="seconds without those of tracing")
        copying = Estimate(0, size, size, seconds=size * (rates.read_again(size) + rates.digest + rates.write))
        return copying + costs.forward_sweep(layers, *_CHECK_SHAPE, besides=size) * 2

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.checkpoint.architecture import full_config

        model = inputs.model
        refusal = self._explain_refusal(explain_removal(full_config(model.base.folder), model.layers, self.programs))
        if refusal is not None:
            raise StageError(refusal)
        with self.new_folder(model.base.folder) as new:
            if self.format == "onnx":
                files, difference = self._write_onnx(model, new.path, context)
            else:
                files = self._write(model, new.path, context)
                difference = check_export(model, new.path, context)
            files = new.finish(make_lineage(model, files, difference, self, context), files)
        made: dict[str, Any] = {"graph": model, "folder": new.target, "files": files, "max_logit_difference": difference}
        size = sum(file.size for file in files.values()) / 1e6
        for line in explain_config(model, with_types=self.format != "onnx"):
            context.note(line)
        if self.format == "onnx":
            context.note(f"wrote {self.to}: {size:.1f} MB, run beside the model, logits equal to {difference:.1e}")
            return self.Outputs(exported=OnnxFolder(**made, dtype=self.onnx.dtype))
        for deviation in find_deviations(model, self.format):
            context.note(deviation)
        context.note(f"wrote {self.to}: {size:.1f} MB, loaded back, logits equal")
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
        """Trace, save, and run the graph beside the model; torch's weights are gone before ONNX Runtime reads its own."""
        from gradmap_pipeline.export.ort.apart import write_graph
        from gradmap_pipeline.export.ort.layout import place_graph, tell_programs
        from gradmap_pipeline.export.ort.parity import check_parity
        from gradmap_pipeline.export.ort.session import OnnxSession

        with context.progress("export to ONNX", 2, "step") as advance:
            graph = folder / place_graph(self.onnx.layout, self.onnx.dtype)
            graph.parent.mkdir(exist_ok=True)
            references, genai = write_graph(model, self.onnx.dtype, context.seed, graph)
            advance()
            difference = check_parity(references, OnnxSession(folder, fast=False), self.onnx.dtype)
            advance()
        (folder / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")
        write_companions(model, folder)
        tell_programs(folder, self.onnx.dtype)
        write_card(folder, model, context.metrics, "onnx")
        return describe_folder(folder), difference

    def _write(self, model: ModelGraph, folder: Path, context: Context) -> dict[str, ExportedFile]:
        from gradmap_pipeline.checkpoint.checkpoint import split_shards, write_folder

        tensors = model.export_tensors()
        shard_bytes = int(self.max_shard_gigabytes * 1e9)
        files: dict[str, ExportedFile] = {}
        with context.progress("write weights", len(split_shards(tensors, model.dtype, shard_bytes)), "shard") as advance:
            for name, written in write_folder(tensors, folder, model.dtype, shard_bytes):
                files[name] = written
                advance()
        write_companions(model, folder)
        write_card(folder, model, context.metrics, "safetensors")
        return describe_folder(folder, files)


def check_export(model: ModelGraph, folder: Path, context: Context) -> float:
    """Load the folder back; raise `StageError` unless every weight finds its place and the logits equal the model's.

    Both run layer by layer in the exported type, so no more than a layer and the embeddings are in memory.
    """
    import torch

    from gradmap_pipeline.checkpoint.graph import open_folder
    from gradmap_pipeline.checkpoint.pretrained import read_config
    from gradmap_pipeline.sweep.finite import find_nonfinite_weights
    from gradmap_pipeline.sweep.sweep import open_sweep

    check_loading(folder)
    reloaded = open_folder(folder, digest_of=lambda _: "")
    stored = next(iter(model.layer_tensors(model.layers[0]).values())).torch_dtype
    dtype = model.dtype or stored

    def compute_logits(graph: ModelGraph) -> torch.Tensor:
        words = int(read_config(graph.base.folder).get_text_config().vocab_size)
        ids = torch.randint(words, _CHECK_SHAPE, generator=torch.Generator().manual_seed(context.seed))
        with open_sweep(graph, (ids, torch.ones_like(ids)), context, dtype=dtype) as sweep:
            return torch.cat([logits.float() for logits in sweep.logits()])

    ours, theirs = compute_logits(model), compute_logits(reloaded)
    if not theirs.isfinite().all():
        cause = find_nonfinite_weights(model) or f"its weights are finite in {dtype}; set another 'dtype' under 'model'"
        raise StageError(f"the model computes values that are not finite: {cause}")
    difference = float((ours - theirs).abs().max())
    if not difference == 0.0:
        raise StageError(
            f"the exported folder does not compute what the model does: logits differ by {difference:.3g}; "
            "nothing was written. Please report this with the name of the model"
        )
    return difference


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ExportModel]
