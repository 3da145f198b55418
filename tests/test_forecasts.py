"""What forecast, inspect, advise and estimate get and give: typed by the artifacts of `Inputs` and `Outputs`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gradmap_plugins.evaluate import Evaluate
from gradmap_plugins.prune import Prune
from pydantic import BaseModel
from typer.testing import CliRunner, Result
from typing_of import check_types

from gradmap_pipeline import (
    Artifact,
    CalibrationForecast,
    CalibrationSet,
    Forecasts,
    LayerScores,
    Model,
    ModelForecast,
    ModelGraph,
    ScoresForecast,
    Stage,
    TransformersFolder,
    known,
)
from gradmap_pipeline.artifacts import NoForecast
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import NotKnownError, PluginError
from gradmap_pipeline.export.exports import ExportForecast, GgufFolder, GgufForecast, OnnxFolder
from gradmap_pipeline.work import Work


class Distil(Stage):
    """Two models and a text."""

    name = "distil"

    class Inputs(BaseModel):
        model: ModelGraph
        teacher: ModelGraph | TransformersFolder
        calibration: CalibrationSet | None = None

    class Outputs(BaseModel):
        model: ModelGraph


@pytest.mark.parametrize(
    ("artifact", "forecast"),
    [
        (ModelGraph, ModelForecast),
        (Model, ModelForecast),
        (CalibrationSet, CalibrationForecast),
        (LayerScores, ScoresForecast),
        (TransformersFolder, ExportForecast),
        (OnnxFolder, ExportForecast),
        (GgufFolder, GgufForecast),
        (Work, NoForecast),
    ],
)
def test_artifacts_name_their_forecast(artifact: type[Artifact], forecast: type[BaseModel]) -> None:
    assert artifact.Forecast is forecast


def test_an_input_is_found_by_its_class() -> None:
    calibration = CalibrationForecast(samples=8, sequence_length=64)
    inputs = Forecasts(Distil, model=ModelForecast(layers=3), teacher=ExportForecast(layers=12), calibration=calibration)
    assert inputs.of(CalibrationSet) == calibration
    assert inputs.of(ModelGraph) == ModelForecast(layers=3)
    assert inputs.of(Model, "model").layers == 3
    assert inputs.of(Model, "teacher").layers == 12
    assert dict(inputs) == {"model": ModelForecast(layers=3), "teacher": ExportForecast(layers=12), "calibration": calibration}


def test_what_is_not_known_is_empty() -> None:
    inputs = Forecasts(Prune, model=None)
    assert inputs.of(ModelGraph) == ModelForecast()
    assert inputs.of(LayerScores) == ScoresForecast()
    assert ("scores" in inputs, "model" in inputs, inputs.get("model"), len(inputs)) == (False, True, None, 1)
    assert Forecasts(Evaluate, model=NoForecast()).of(Model) == ModelForecast()


def test_which_class_an_input_will_be_of() -> None:
    folder = Forecasts(Distil, {"model": ModelGraph, "teacher": TransformersFolder}, model=None, teacher=None)
    assert (folder.has(TransformersFolder), folder.has(ModelGraph), folder.has(CalibrationSet)) == (True, True, False)
    assert not Forecasts(Distil, teacher=None).has(TransformersFolder)
    assert Forecasts(Distil, teacher=None).has(Model)


def test_an_input_that_is_not_there_is_told() -> None:
    inputs = Forecasts(Distil)
    listed = "inputs are model: ModelGraph, teacher: ModelGraph or TransformersFolder, calibration: CalibrationSet"
    with pytest.raises(PluginError) as caught:
        inputs.of(LayerScores)
    assert str(caught.value) == f"Distil has no input of class LayerScores; {listed}"
    with pytest.raises(PluginError) as caught:
        inputs.of(ModelGraph, "teacher")
    assert str(caught.value) == f"Distil has no input 'teacher' of class ModelGraph; {listed}"
    with pytest.raises(PluginError) as caught:
        inputs.of(Model)
    assert str(caught.value) == "inputs model and teacher of Distil are of class Model; name one, as in inputs.of(Model, 'model')"
    with pytest.raises(PluginError, match="Distil has no input 'modle'; inputs are model, teacher, calibration"):
        Forecasts(Distil, modle=None)


def test_known_values_pass_and_others_end_the_method() -> None:
    assert (known(3), known(0), known("")) == (3, 0, "")
    with pytest.raises(NotKnownError):
        known(None)


def test_the_forecast_of_a_class_must_be_one_that_can_be_empty() -> None:
    with pytest.raises(
        PluginError, match=r"class Odd in \S+: 'Forecast' must be a class derived from .*BaseModel, got the class int"
    ):

        class Odd(Artifact):
            Forecast = int  # type: ignore[assignment]

    with pytest.raises(PluginError, match=r"class Strict in \S+: field 'layers' of its 'Forecast' needs a default"):

        class Strict(Artifact):
            class Forecast(BaseModel):
                layers: int


PLUGIN = """
from pydantic import BaseModel
from gradmap_pipeline import (
    Artifact, CalibrationSet, Estimate, Forecasts, ModelCosts, ModelForecast, ModelGraph, Outlook, Stage, TransformersFolder,
    hookimpl, known,
)

class Digest(Artifact):
    number: int = 1
    class Forecast(BaseModel):
        number: int | None = None

class MakeDigest(Stage):
    '''Make a digest.'''
    name = "make_digest"
    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet | None = None
    class Outputs(BaseModel):
        digest: Digest
        OUTPUT
    def forecast(self, inputs: Forecasts) -> Outlook:
        FORECAST
    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        ESTIMATE
    def run(self, inputs: Inputs, context: object) -> Outputs:
        return self.Outputs(digest=Digest())

@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [MakeDigest]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    steps = [{"id": "s", "use": "make_digest"}]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    return tmp_path


def write_plugin(forecast: str = "return {}", estimate: str = "return None", output: str = "") -> None:
    text = PLUGIN.replace("FORECAST", forecast).replace("ESTIMATE", estimate).replace("OUTPUT", output)
    Path("p.py").write_text(text)


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "r.yaml", "--plugin", "p.py"])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("{'digest': ModelForecast()}", "for output 'digest' Digest.Forecast (Forecast) or None, got a ModelForecast"),
        ("{'digest': 5}", "for output 'digest' Digest.Forecast (Forecast) or None, got 5"),
        ("{'model': None}", "a mapping of its outputs (digest), got one of 'model'"),
        ("None", "a mapping of output names, got None"),
    ],
)
def test_a_forecast_of_another_class_is_told(answer: str, told: str, folder: Path) -> None:
    write_plugin(f"return {answer}")
    result = gradmap("check")
    message = f"error: step 's': forecast() of stage 'make_digest' (p.py) must return {told}\n"
    assert (result.exit_code, result.stderr) == (2, message)


def test_a_plugin_of_before_that_hands_the_models_forecast_on_is_told(folder: Path) -> None:
    write_plugin("return {'model': inputs.get('model')}", output="model: TransformersFolder")
    message = "for output 'model' TransformersFolder.Forecast (ExportForecast) or None, got a ModelForecast"
    assert message in gradmap("check").stderr
    write_plugin("return {'model': TransformersFolder.Forecast.of(inputs.of(ModelGraph))}", output="model: TransformersFolder")
    assert gradmap("check").exit_code == 0


def test_names_of_before_work(folder: Path) -> None:
    write_plugin(
        "model = inputs.get('model')\n        return {} if model is None else {'digest': Digest.Forecast(number=model.layers)}"
    )
    assert gradmap("check").exit_code == 0


@pytest.mark.parametrize("answer", ["return {'digest': Digest.Forecast(number=known(inputs.of(CalibrationSet).samples))}"])
def test_what_needs_an_unknown_value_is_not_known(answer: str, folder: Path) -> None:
    write_plugin(answer, "return Estimate(known(inputs.of(CalibrationSet).samples))")
    result = gradmap("plan", "--json")
    assert result.exit_code == 0, result.stderr
    (step,) = [step for step in json.loads(result.stdout)["steps"] if step["step"] == "s"]
    assert step["estimate"] is None
    write_plugin("return {}", "return Estimate(known(inputs.of(ModelGraph).layers))")
    (step,) = [step for step in json.loads(gradmap("plan", "--json").stdout)["steps"] if step["step"] == "s"]
    assert step["estimate"]["peak_bytes"] == 4


def test_a_class_that_the_stage_does_not_take_is_told(folder: Path) -> None:
    write_plugin("return {'digest': inputs.of(Digest)}")
    result = gradmap("check")
    assert result.exit_code == 2
    assert "MakeDigest has no input of class Digest; inputs are model: ModelGraph, calibration: CalibrationSet" in result.stderr


TYPED = """
from pydantic import BaseModel
from gradmap_pipeline import Artifact, CalibrationSet, Forecasts, GgufFolder, LayerScores, Model, ModelGraph, OnnxFolder
from gradmap_pipeline import TransformersFolder, known

class Digest(Artifact):
    class Forecast(BaseModel):
        number: int | None = None

def read(inputs: Forecasts) -> list[int]:
    _ = inputs.of(LayerScores).decisions, inputs.of(TransformersFolder).quantisation, inputs.of(GgufFolder).type
    return [known(inputs.of(ModelGraph).layers), known(inputs.of(CalibrationSet).samples), known(inputs.of(Digest).number)]

def misread(inputs: Forecasts) -> None:
"""
WRONG = {
    "inputs.of(ModelGraph).layres": '"ModelForecast" has no attribute "layres"; maybe "layers"?',
    "inputs.of(ModelGraph).layers + 1": 'Unsupported operand types for + ("None" and "int")',
    "inputs.of(Model).samples": '"ModelForecast" has no attribute "samples"',
    "inputs.of(OnnxFolder).type": '"ExportForecast" has no attribute "type"',
    "inputs.of(CalibrationSet).tokens": '"CalibrationForecast" has no attribute "tokens"',
    "inputs.of(Digest).layers": '"Forecast" has no attribute "layers"',
    'known(inputs["model"]).layers': '"BaseModel" has no attribute "layers"',
    "inputs.of(int)": 'Argument 1 to "of" of "Forecasts" has incompatible type "type[int]"',
    "inputs.model": '"Forecasts" has no attribute "model"',
}


@pytest.mark.full
def test_type_checkers_see_the_fields_of_forecasts(tmp_path: Path) -> None:
    file = tmp_path / "typed.py"
    file.write_text(TYPED + "".join(f"    _ = {expression}\n" for expression in WRONG))
    done = check_types([file], tmp_path)
    first = len(TYPED.splitlines()) + 1
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == len(WRONG), done.stdout
    for number, (error, message) in enumerate(zip(errors, WRONG.values(), strict=True), first):
        assert error.startswith(f"typed.py:{number}: error: {message}")
