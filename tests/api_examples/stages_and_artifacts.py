"""A stage of one's own with an artifact of its own: what it knows before the run, what it refuses, and what it gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Artifact,
    CalibrationForecast,
    CalibrationSet,
    CapacityError,
    Context,
    Decision,
    Environment,
    Estimate,
    Evaluation,
    ExportedFile,
    Forecasts,
    LayerScores,
    Measurement,
    Metric,
    ModelCosts,
    ModelError,
    ModelForecast,
    ModelGraph,
    NameOf,
    OptionError,
    Outlook,
    PruningTarget,
    QualityError,
    Round,
    ScoresForecast,
    Stage,
    StageError,
    StructureProbe,
    TensorFile,
    Work,
    explain_missing,
    hookimpl,
    known,
    lack_of_memory,
    load_tensor,
)
from gradmap_pipeline.testing import make_context, make_inputs, run_stage


class Norms(Artifact):
    """Norms of all tensors of a model's layers."""

    model: str
    title: Annotated[str, NameOf("title")]
    """A name for people: another one is no other result."""
    tensors: TensorFile
    largest: float

    def list_metrics(self) -> Sequence[Metric]:
        return [Metric(name="largest norm", value=self.largest, better="lower")]


class MeasureNorms(Stage):
    """Measure the norms of the tensors in the layers, and give the model without those layers that the scores put first."""

    name = "measure_norms"

    title: str = Field("norms", description="Name of the result.")
    drop: int = Field(1, ge=0, description="How many layers to drop.")

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet
        scores: LayerScores | None = None

    class Outputs(BaseModel):
        model: ModelGraph
        norms: Norms
        work: Work

    def forecast(self, inputs: Forecasts) -> Outlook:
        model, text = inputs.of(ModelGraph), inputs.of(CalibrationSet)
        if "scores" in inputs and self.drop > known(inputs.of(LayerScores).decisions):
            raise OptionError("drop", f"found {self.drop}; more layers than are scored")
        if known(text.samples) < 1:
            raise OptionError("", "the calibration set is empty")
        return {"model": model.model_copy(update={"layers": known(model.layers) - self.drop, "kept": None})}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()  # raises ModelError where the architecture cannot be run layer by layer
        if not any(probe.find_sites().values()):
            raise ModelError("no layer can be corrected")

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        size = costs.count_bytes(known(inputs.of(ModelGraph).layers))
        return Estimate(costs.program_bytes, bytes_read=size, seconds=size * costs.speed.read_again(size))

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        graph = inputs.model
        with context.progress("measure", len(graph.layers), "layer") as advance:
            norms = {}
            for layer in graph.layers:
                for name, stored in graph.layer_tensors(layer).items():
                    if 8 * stored.elements > context.memory:
                        error: CapacityError = lack_of_memory(f"{name} takes more than is allowed", 8 * stored.elements)
                        raise error
                    norms[name] = load_tensor(stored).double().norm()
                advance()
        largest = max(map(float, norms.values()))
        if largest == 0:
            raise StageError("all tensors are zero")
        if largest > 1e6:
            raise QualityError(f"the largest norm is {largest:g}, over 1e6")
        context.note(f"the largest norm is {largest:.3g}")
        first = graph.layers[: self.drop] if inputs.scores is None else inputs.scores.order[: self.drop]
        return self.Outputs(
            model=graph.without_layers(first),
            norms=Norms(
                model=graph.digest,
                title=self.title,
                tensors=TensorFile.save(norms, context.folder / "norms.safetensors"),
                largest=largest,
            ),
            work=Work(rounds=(Round(layer_forwards=0, layer_backwards=0, seconds=0.1),)),
        )


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [MeasureNorms]


# A plan asks the stage before the run.
before = ModelForecast(layers=12, kept=tuple(range(12)))
text = CalibrationForecast(samples=4, sequence_length=32)
forecasts = Forecasts(MeasureNorms, model=before, calibration=text, scores=ScoresForecast(decisions=3))
assert MeasureNorms(drop=2).forecast(forecasts) == {"model": ModelForecast(layers=10)}
with pytest.raises(OptionError, match="found 4; more layers than are scored"):
    MeasureNorms(drop=4).forecast(forecasts)

# A test runs it on small inputs.
inputs = make_inputs(MeasureNorms, Path("inputs"))
outputs = run_stage(MeasureNorms(drop=1), Path("run"), **inputs)
assert len(outputs.model.layers) == len(inputs["model"].layers) - 1
assert max(map(float, outputs.norms.tensors.load().values())) == outputs.norms.largest
MeasureNorms().inspect(forecasts, StructureProbe(inputs["model"], memory=1 << 32))

# Artifacts that ship are made in the same way.
decision = Decision(removed=2, scores={1: 0.5, 2: 0.1}, removed_if_unprotected=2)
assert LayerScores(model=inputs["model"].digest, method="by hand", decisions=(decision,)).order == (2,)
measured = Measurement(model=inputs["model"].digest, metrics=(Metric(name="accuracy", value=0.5, better="higher", stderr=0.01),))
assert measured.list_metrics()[0].figure == "0.5000 ± 0.01"
evaluation = Evaluation(
    model=inputs["model"].digest, label="pruned", dataset="a text", perplexity=2.0, loss=0.69, samples=4, sequence_length=32,
    tokens=124, layers=10, parameters=1000, bytes=4000,
)  # fmt: skip
assert evaluation.list_metrics()[0].name == "perplexity"
assert ExportedFile(size=4, sha256="0" * 64).size == 4

# Libraries that a stage needs are declared on its class; `explain_missing` says how to get those of one option.
assert explain_missing(["no_such_module"], extra="onnx") == (
    "needs no_such_module, which is not installed: pip install 'gradmap-pipeline[onnx]'"
)
assert Environment(("llmcompressor==0.14.0",)).requirements == ("llmcompressor==0.14.0",)

# What a pruned model is to meet is a value of its own: sizes are told from the shapes of tensors alone.
target = PruningTarget.model_validate({"parameters": "600k"})
model = inputs["model"]
removed = target.choose(model, 6, lambda count: list(range(2, 2 + count)), None, make_context(Path("target")))
assert model.without_layers(removed).count_parameters() <= 600_000 < model.without_layers(removed[1:]).count_parameters()
