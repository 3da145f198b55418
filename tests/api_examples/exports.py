"""Folders for other programs: written, checked against the model, quantised and compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from gradmap_pipeline import (
    LINEAGE,
    Agreement,
    CapacityError,
    Context,
    DatasetSource,
    DecodingShape,
    Estimate,
    Export,
    ExportableModel,
    FileAgreement,
    FolderExport,
    Forecasts,
    GgufConverter,
    GgufFolder,
    GgufQuantiser,
    ModelCosts,
    ModelForecast,
    ModelSource,
    OnnxFolder,
    OnnxQuantisation,
    OptionError,
    Outlook,
    QuantisedGraph,
    Rates,
    Speed,
    SpeedCase,
    TextAgreement,
    TransformersFolder,
    check_export,
    check_onnx_exportable,
    check_room_for_decoding,
    check_text,
    compare_models,
    copy_files,
    describe_folder,
    estimate_decoding,
    estimate_tracing_memory,
    explain_config,
    explain_forecast,
    explain_removal,
    extend_lineage,
    find_deviations,
    find_index_programs,
    full_config,
    load_folder,
    make_lineage,
    measure_speed,
    open_model,
    read_text,
    take_graph,
    write_card,
    write_companions,
    write_onnx_folder,
    write_quantised,
    write_transformers_folder,
)
from gradmap_pipeline.testing import make_context, run_stage

model = open_model(ModelSource(builtin="docs-llama")).without_layers([4, 8])
config = full_config(model.base.folder)
assert find_index_programs(config, model.base.folder) == []
assert explain_removal(config, model.layers) == find_deviations(model, "safetensors") == explain_config(model) == []


class ExportFolder(FolderExport):
    """Write a folder that plain transformers loads, and load it back."""

    name = "export_folder"

    class Inputs(BaseModel):
        model: ExportableModel

    class Outputs(BaseModel):
        exported: TransformersFolder

    def forecast(self, inputs: Forecasts) -> Outlook:
        model = inputs.of(ExportableModel)
        for misreading in explain_forecast(model):
            raise OptionError("to", misreading)
        return {**super().forecast(inputs), "exported": TransformersFolder.Forecast.of(model)}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model = take_graph(inputs.model, context)
        with self.new_folder(model.base.folder) as new:
            files = write_transformers_folder(model, new.path, context, shard_bytes=10**9)
            difference = check_export(model, new.path, context)
            files = new.finish(make_lineage(model, files, difference, self, context), files)
        return self.Outputs(
            exported=TransformersFolder(graph=model, folder=new.target, files=files, max_logit_difference=difference)
        )


exported = run_stage(ExportFolder(to=Path("plain")), Path("step"), model=model).exported
assert isinstance(exported, TransformersFolder)
assert issubclass(TransformersFolder, Export)
assert exported.max_logit_difference == 0
assert json.loads((Path("plain") / LINEAGE).read_text())["layers_removed"] == [4, 8]
assert len(load_folder(Path("plain")).model.layers) == 10


class RoundWeights(ExportFolder):
    """Write a folder with the weights of linear layers on 255 values a row."""

    name = "round_weights"

    def run(self, inputs: ExportFolder.Inputs, context: Context) -> ExportFolder.Outputs:
        model = take_graph(inputs.model, context)
        with self.new_folder(model.base.folder) as new:
            folder = write_quantised(model, new, "safetensors", "int8 rounded", round_folder, self, context)
        return self.Outputs(exported=folder)


def round_folder(folder: Path) -> Any:
    whole = load_folder(folder)
    for layer in whole.model.layers:
        weight = layer.mlp.down_proj.weight.data
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        weight.copy_((weight / scale).round() * scale)
    return whole


rounded = run_stage(RoundWeights(to=Path("rounded")), Path("rounding"), model=model).exported

# How far two models are apart on a text.
heldout = DatasetSource(builtin="heldout")
check_text(heldout, 2, 32, ModelForecast(positions=512))  # raises OptionError where it is too long or too short
batches = read_text(model.base, heldout, 2, 32)
agreement: Agreement = compare_models(exported.open("cpu"), rounded.open("cpu"), batches)
assert 0.9 < agreement.ratio < 1.1
on_text = TextAgreement.of(agreement, heldout.name, model=rounded.digest)
assert on_text.tokens == 2 * 31
assert [metric.name for metric in on_text.list_metrics()] == ["agreement", "perplexity_ratio"]
assert agreement.find_missed(heldout.name, max_perplexity_ratio=1.1, min_agreement=None) == []

# A folder of another format is filled with the same parts, and one that is made from an export takes over its lineage.
context = make_context(Path("other"))
other = Path("other-format")
other.mkdir()
write_companions(model, other)
copy_files(Path("plain"), iter(["model.safetensors"]), other)
write_card(other, model, [], "safetensors", details=("made by hand",))
files = describe_folder(other)
lineage = extend_lineage(Path("plain"), files, 0.0, ExportFolder(to=other), context)
assert set(lineage["files"]) == {file.name for file in other.iterdir()}

# ONNX: one graph, run beside the model; then one with weights in 8 bits, run beside the first.
check_onnx_exportable(model)
assert estimate_tracing_memory(10**6, 10**8) > 10**8
onnx = Path("onnx")
onnx.mkdir()
files, difference = write_onnx_folder(model, onnx, "float32", "flat", context)
graph = OnnxFolder(graph=model, folder=onnx.resolve(), files=files, max_logit_difference=difference, dtype="float32")
small = Path("small")
small.mkdir()
quantised = QuantisedGraph(graph, small)
made = quantised.write_graph(OnnxQuantisation("int8", 32, "nearest", 0.0, None), context)
assert made.count > 0
assert abs(quantised.compare(batches, context).ratio - 1) < 0.1
quantised.write_companions("int8")
assert (small / "config.json").is_file()

# GGUF is made and quantised by llama.cpp's programs, where they are.
converter = GgufConverter(converter=Path("no-such-file.py"), python=None)
with pytest.raises(OptionError, match=r"there is no file 'no-such-file\.py'"):
    converter.check(ModelForecast())
with pytest.raises(OptionError, match="there is no file 'no-such-program'"):
    GgufQuantiser(program=Path("no-such-program"), python=None).check()
assert GgufFolder.Forecast.of(ModelForecast(layers=10), type="f16").type == "f16"
parity = FileAgreement(lengths=(12,), difference=0.1, log_probability_difference=0.01, agreeing=1.0, lost=0.0)
assert str(parity).startswith("at 9 positions of random prompts, 100% of likeliest tokens are those")

# Speed: both models are timed in turn, here on one prompt of 8 tokens and 4 tokens after it, three times.
shape = DecodingShape(sequences=1, prompt_tokens=8, new_tokens=4)
check_room_for_decoding(model, [shape], context.memory, context.dtype)
with pytest.raises(CapacityError, match="a benchmark takes the whole model in memory"):
    check_room_for_decoding(model, [shape], 2**20, context.dtype)


def estimate_both(costs: ModelCosts) -> Estimate:
    """What three rounds of a model of 10 layers and one of 12 take, for the `estimate` of a stage."""
    return estimate_decoding(costs, [10, 12], [shape], rounds=3)


speed = measure_speed(model, model.dense, [shape], context, rounds=3, warmup=1)
assert isinstance(speed, Speed)
case: SpeedCase = speed.cases[0]
rates: Rates = case.rates
assert len(rates.prefill) == len(rates.decode) == 3
assert "decode_speedup" in {metric.name for metric in speed.list_metrics()}
