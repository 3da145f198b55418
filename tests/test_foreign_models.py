"""A model of a class that only a plugin knows: evaluated, limited, shown and kept as those of this package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from gradmap_pipeline import Artifact, CalibrationSet, Export, ExportableModel, Model, ModelGraph, Stage, TransformersFolder
from gradmap_pipeline.batches import make_batches
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.data import load_tokenizer
from gradmap_pipeline.errors import PluginError, QualityError, StageError

PLUGIN = '''
from pydantic import BaseModel, Field
from gradmap_pipeline import Artifact, ModelForecast, ModelGraph, Stage, hookimpl


class SharpModel(Artifact):
    """A model whose logits are multiplied by a number."""

    Forecast = ModelForecast
    graph: ModelGraph
    factor: float

    @property
    def label(self):
        return f"{self.graph.label}, sharpened"

    @property
    def size_bytes(self):
        return self.graph.size_bytes + 8

    def open(self, device):
        run = self.graph.open(device)
        return lambda batch: run(batch) * self.factor


class SharpenModel(Stage):
    """Multiply the logits by a number."""

    name = "sharpen_model"
    factor: float = Field(2.0, description="The number.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        model: SharpModel

    def forecast(self, inputs):
        return {"model": inputs.of(ModelGraph)}

    def run(self, inputs, context):
        return self.Outputs(model=SharpModel(graph=inputs.model, factor=self.factor))


@hookimpl
def gradmap_stages():
    return [SharpenModel]
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sharp.py").write_text(PLUGIN)
    scoring = {"dataset": {"path": str(text)}, "samples": 10, "sequence_length": 32}
    steps: list[dict[str, Any]] = [{"use": "prune", "with": {"layers": [1]}}, {"use": "sharpen_model"}]
    steps.append({"use": "evaluate", "with": scoring})
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    return tmp_path


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--plugin", "sharp.py"])


def run(*arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of the model in the summary, and all events."""
    result = gradmap("run", "r.yaml", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    (row,) = [row for row in events[-1]["summary"]["models"] if "sharpened" in row["label"]]
    return row, events


def perplexity(llama: Path, text: Path, factor: float) -> float:
    """Of the model without layer 1, by transformers in fp64: exp of the mean of log Σ exp(f·z) - f·z of the next token."""
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    del whole.model.layers[1]
    for number, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = number
    ids = load_tokenizer(open_folder(llama).base)(text.read_text())["input_ids"]
    sequences = torch.tensor([ids[:32], *([1, *ids[n * 31 + 1 : n * 31 + 32]] for n in range(1, 10))])
    with torch.no_grad():
        logits = whole(input_ids=sequences, use_cache=False).logits[:, :-1] * factor
    losses = logits.logsumexp(-1) - logits.gather(-1, sequences[:, 1:, None])[..., 0]
    return math.exp(float(losses.mean()))


def test_it_is_evaluated_and_shown(folder: Path, llama: Path, text: Path) -> None:
    row, _ = run()
    size = open_folder(llama).without_layers([1]).size_bytes
    assert (row["label"], row["layers"], row["bytes"]) == ("pruned, sharpened", 3, size + 8)
    (measured,) = row["metrics"].values()
    assert measured["value"] == pytest.approx(perplexity(llama, text, 2.0), rel=1e-5)
    shown = gradmap("run", "r.yaml", "--set", "sharpen_model.factor=1")
    assert "pruned, sharpened" in shown.stdout
    assert f"{perplexity(llama, text, 1.0):.3f}"[:5] in shown.stdout


def test_a_limit_stops_the_run(folder: Path) -> None:
    result = gradmap("run", "r.yaml", "--set", "evaluate.max_perplexity_ratio=0.5")
    assert result.exit_code == QualityError.exit_code
    assert "times that of the unpruned model" in result.stderr


def test_its_own_code_counts(folder: Path, llama: Path, text: Path) -> None:
    """What evaluate runs is a method of the plugin; where that is edited, an earlier result is none of the new one."""
    run()
    _, events = run()
    assert [step["cached"] for step in events[-1]["summary"]["steps"]] == [True, True, True]
    (folder / "sharp.py").write_text(PLUGIN.replace("run(batch) * self.factor", "run(batch) * (self.factor + 1)"))
    row, _ = run()
    assert next(iter(row["metrics"].values()))["value"] == pytest.approx(perplexity(llama, text, 3.0), rel=1e-5)


def test_plan_says_its_layers_and_no_cost_of_another_program(folder: Path) -> None:
    result = gradmap("plan", "r.yaml", "--json")
    assert result.exit_code == 0, result.stderr
    steps = {step["step"]: step for step in json.loads(result.stdout)["steps"]}
    assert steps["sharpen_model"]["parameters"] == steps["prune"]["parameters"]
    assert steps["evaluate"]["estimate"] is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def size_bytes(self):", "def bytes_of(self):"),
        ("    @property\n    def size_bytes", "    def size_bytes"),
        ("    graph: ModelGraph\n", "    inner: ModelGraph\n"),
        ("def open(self", "def load(self"),
    ],
)
def test_a_class_that_lacks_something_is_no_model(old: str, new: str, folder: Path) -> None:
    (folder / "sharp.py").write_text(PLUGIN.replace(old, new))
    result = gradmap("check", "r.yaml")
    assert result.exit_code == 2
    assert "step 'evaluate' takes a Model as 'model', but after step 'sharpen_model' it is a SharpModel" in result.stderr


def test_which_classes_are_models() -> None:
    class Folder(Export):
        """A folder that nothing here can run."""

    assert issubclass(ModelGraph, Model)
    assert issubclass(ModelGraph, ExportableModel)
    assert not issubclass(TransformersFolder, ExportableModel)
    assert not issubclass(CalibrationSet, Model)
    assert not issubclass(Folder, Model)
    assert not issubclass(int, Model)

    class Inputs(BaseModel):
        model: Model

    with pytest.raises(ValidationError, match="should be an instance of Model"):
        Inputs.model_validate({"model": {"label": "dense"}})


def test_a_class_derived_from_model_must_be_whole() -> None:
    with pytest.raises(PluginError, match=r"Half in .* derives from Model, and must define a property or field 'label'"):

        class Half(Model):
            pass

    with pytest.raises(PluginError, match="must define a method 'open'"):

        class Closed(Model):
            label: str
            size_bytes: int
            graph: ModelGraph


def test_an_export_takes_a_model_that_computes_its_graph(folder: Path, llama: Path) -> None:
    """The folder has the weights that the graph alone gives, and the model its row in the table as before."""
    exporting = {"version": 1, "model": {"path": str(llama)}, "steps": [{"use": "prune", "with": {"layers": [1]}}]}
    exporting["steps"] += [{"use": "export", "with": {"to": "plain"}}, {"use": "sharpen_model", "with": {"factor": 1.0}}]
    exporting["steps"] += [{"use": "export", "id": "again", "with": {"to": "sharp"}}]
    (folder / "e.yaml").write_text(json.dumps(exporting))
    refused = gradmap("check", "e.yaml")
    assert refused.exit_code == 2
    assert "step 'again' takes an ExportableModel as 'model', but after step 'sharpen_model' it is a SharpModel" in refused.stderr
    says = "    computes_graph: typing.ClassVar[bool] = True\n\n    @property"
    (folder / "sharp.py").write_text("import typing\n" + PLUGIN.replace("\n    @property", says, 1))
    done = gradmap("run", "e.yaml")
    assert done.exit_code == 0, done.stderr
    for name in ("model.safetensors", "config.json"):
        assert (folder / "plain" / name).read_bytes() == (folder / "sharp" / name).read_bytes()
    wrong = gradmap("run", "e.yaml", "--set", "sharpen_model.factor=1.5")
    assert wrong.exit_code == StageError.exit_code
    assert "a SharpModel cannot be exported: its class says `computes_graph`, but its logits differ from" in wrong.stderr


def test_names_of_before_say_what_they_are_now(llama: Path) -> None:
    with pytest.raises(AttributeError, match="'count_bytes' of ModelGraph is the property 'size_bytes' now"):
        open_folder(llama).count_bytes()
    with pytest.raises(PluginError, match=r"class Old in .*: 'count_bytes' is the property 'size_bytes' now"):

        class Old(Export):
            def count_bytes(self) -> int:
                return 1

    class Plain(Artifact):
        pass

    with pytest.raises(AttributeError, match="'Plain' object has no attribute 'count_bytes'"):
        Plain().count_bytes()


def test_a_graph_opens_as_the_whole_model(llama: Path) -> None:
    ids = torch.arange(10).view(2, 5)
    (batch,) = make_batches(ids, torch.ones_like(ids), 100)
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
    graph = open_folder(llama)
    torch.testing.assert_close(graph.open("cpu")(batch).double(), expected, atol=1e-4, rtol=1e-4)
    assert graph.graph is graph


def test_an_output_is_of_one_class_of_models() -> None:
    with pytest.raises(PluginError, match=r"stage 'make_any': Outputs.model must be one class of models; Model is for inputs"):

        class MakeAny(Stage):
            """Make any."""

            name = "make_any"

            class Inputs(BaseModel):
                model: Model

            class Outputs(BaseModel):
                model: Model


def test_an_export_of_before_is_told_the_name_of_now() -> None:
    with pytest.raises(PluginError, match=r"class OldFolder in .*: 'kind' is the property 'format_name' now"):

        class OldFolder(Export):
            @property
            def kind(self) -> str:
                return "old"

    class Other(Artifact):
        @property
        def kind(self) -> str:
            return "of its own"

    assert Other().kind == "of its own"
