"""Layers refit by gradient: each step against formulas in fp64, and what holds whatever the model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins import refit_layers
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.evaluate import Evaluate
from gradmap_plugins.project_compensate import ProjectCompensate
from gradmap_plugins.refit_layers import RefitLayers
from tiny import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from gradmap_pipeline import CalibrationSet, CapacityError, ModelGraph, ModelSource, StageError, open_model
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.context import FinishedStep
from gradmap_pipeline.correction import fitting
from gradmap_pipeline.correction.adam import Adam
from gradmap_pipeline.correction.fitting import rate_at
from gradmap_pipeline.correction.refit import count_batch_samples, count_best_bytes
from gradmap_pipeline.machine.memory import resident_bytes
from gradmap_pipeline.testing import make_context, run_stage

pytestmark = pytest.mark.full

RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: calibrate
    with: {dataset: {path: TEXT}, samples: 16, sequence_length: 32}
  - use: prune
    with: {layers: [1, 3]}
  - use: refit_layers
    with: {steps: 6}
"""


def make_inputs(folder: Path, text: Path, architecture: str = "llama", **changes: Any) -> tuple[ModelGraph, CalibrationSet]:
    graph = open_folder(make_model(folder / "model", architecture, **changes))
    draw = Calibrate.model_validate({"dataset": {"path": text}, "samples": 16, "sequence_length": 32})
    return graph, run_stage(draw, folder / "calibration", model=graph).calibration


def changed_tensors(before: ModelGraph, after: ModelGraph) -> dict[str, torch.Tensor]:
    return {name: file.load()[name] for name, file in after.patches.items() if name not in before.patches}


def test_adam_follows_its_formula() -> None:
    """Three steps of two weights with rates of their own, against the algorithm of the paper in fp64."""
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    expected = {name: weight.double() for name, weight in weights.items()}
    moments = {name: [torch.zeros_like(weight), torch.zeros_like(weight)] for name, weight in expected.items()}
    adam, rates = Adam(weights), {"a": 0.1, "b": 0.02}
    for t in range(1, 4):
        gradients = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
        adam.step(gradients, rates)
        for name, (m, v) in moments.items():
            g = gradients[name].double()
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            expected[name] -= rates[name] * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-12)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_rate_rises_for_a_tenth_and_falls_to_nothing() -> None:
    assert [rate_at(step, 20) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate_at(11, 20) == pytest.approx(0.5)
    assert rate_at(19, 20) == pytest.approx(1 / 18)
    assert rate_at(0, 1) == 1


def test_batches_do_not_depend_on_memory() -> None:
    assert count_batch_samples(4, 128, 256) == 4
    assert count_batch_samples(4, 128, 2048) == 2
    assert count_batch_samples(6, 32, 256) == 3  # 4 would be no part of 6
    assert count_batch_samples(4, 8, 16) == 1  # so that one can be held out


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_first_step_goes_against_the_gradient(architecture: str, text: Path, tmp_path: Path) -> None:
    """One step of Adam is the rate against the sign of each gradient; gradients are those of a whole model in fp64."""
    graph, calibration = make_inputs(tmp_path, text, architecture)
    pruned = graph.without_layers([2])
    stage = RefitLayers(layers="next_to_cuts", steps=1, learning_rate=1e-3, batch_size=14)
    result = run_stage(stage, tmp_path / "out", model=pruned, calibration=calibration)

    whole: Any = AutoModelForCausalLM.from_pretrained(graph.base.folder, dtype=torch.float64).eval()
    layers = whole.get_submodule("model.layers" if architecture == "llama" else "transformer.h")
    seen: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        return lambda _, __, output: seen.update({index: output[0] if isinstance(output, tuple) else output})

    for index in (1, 2):
        layers[index].register_forward_hook(keep(index))
    ids = calibration.load()[0]
    whole(input_ids=ids, use_cache=False)
    made, target = seen[1], seen[2].detach()
    errors = (made - target).square().sum(-1) / target.square().sum(-1)
    train, held = errors[:14], errors[14:]  # one sample in eight is held out, from the end
    train.mean().backward()
    first = result.refit.layers[0]
    assert (first.layer, first.step) == (1, 1)
    assert first.before == pytest.approx(float(held.detach().mean()), rel=1e-4)
    assert first.after < first.before
    compared = 0
    for name, parameter in layers[1].named_parameters():
        disk = next(full for full in result.model.patches if full.endswith(f".1.{name}"))
        value, before, gradient = result.model.patches[disk].load()[disk].double(), parameter.detach(), parameter.grad
        size = max(1e-3, float(before.square().mean().sqrt()))
        clear = gradient.abs() > 1e-4 * gradient.abs().max()  # elsewhere rounding may decide the sign
        torch.testing.assert_close(
            (value - before)[clear],
            -1e-3 * size * gradient.sign()[clear],
            rtol=0.02,
            atol=2e-7 * max(1.0, float(before.abs().max())),
        )
        compared += int(clear.sum())
    assert compared > 5000


def test_same_seed_same_bytes_and_another_seed_others(text: Path, tmp_path: Path) -> None:
    graph, calibration = make_inputs(tmp_path, text)
    pruned, stage = graph.without_layers([1]), RefitLayers(steps=8)
    one, two, other = (
        run_stage(stage, tmp_path / name, seed=seed, model=pruned, calibration=calibration)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert one.model.digest == two.model.digest != other.model.digest
    assert one.refit == two.refit
    assert [layer.layer for layer in one.refit.layers] == [0, 2, 3]
    assert one.model.count_parameters() == pruned.count_parameters()
    assert one.model.label == "refit"


def test_best_weights_in_bfloat16_lose_nothing_that_is_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, calibration = make_inputs(tmp_path, text, dtype=torch.bfloat16)
    pruned, stage = graph.without_layers([1]), RefitLayers(steps=8)
    assert (count_best_bytes(graph), count_best_bytes(open_folder(make_model(tmp_path / "wide")))) == (2, 4)
    held = run_stage(stage, tmp_path / "held", model=pruned, calibration=calibration)
    monkeypatch.setattr(fitting, "type_of_best", lambda _: torch.float32)
    wide = run_stage(stage, tmp_path / "in fp32", model=pruned, calibration=calibration)
    assert held.refit == wide.refit
    assert held.model.digest == wide.model.digest != pruned.digest


def test_errors_fall_layer_by_layer(text: Path, tmp_path: Path) -> None:
    """And the error of the last layer is that of the whole models' hidden states."""
    graph, calibration = make_inputs(tmp_path, text)
    pruned = graph.without_layers([1])
    result = run_stage(RefitLayers(steps=40, learning_rate=0.02), tmp_path / "out", model=pruned, calibration=calibration)
    assert all(layer.after < layer.before for layer in result.refit.layers)
    ids = calibration.load()[0][14:]
    with torch.no_grad():
        wanted, made = (last_hidden(one, ids) for one in (graph, result.model))
    error = ((made - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert result.refit.layers[-1].after == pytest.approx(float(error), rel=1e-3)


def last_hidden(graph: ModelGraph, ids: torch.Tensor) -> torch.Tensor:
    """What leaves the last layer of a Llama, (B, T, D)."""
    from gradmap_pipeline.checkpoint.whole import load_whole

    taken: list[torch.Tensor] = []
    module: Any = load_whole(graph, "float32", "cpu")
    module.model.norm.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    module(input_ids=ids, use_cache=False)
    return taken[0].double()


def test_a_layer_that_no_step_betters_is_left_and_named(text: Path, tmp_path: Path) -> None:
    graph, calibration = make_inputs(tmp_path, text)
    pruned, notes = graph.without_layers([1]), []  # type: ignore[var-annotated]
    stage = RefitLayers(steps=3, learning_rate=0.99)
    result: Any = stage.run(stage.Inputs(model=pruned, calibration=calibration), make_context(tmp_path / "out", notes=notes))
    left = [layer for layer in result.refit.layers if not layer.step]
    assert left
    assert all(layer.after == layer.before for layer in left)
    assert f"layer {left[0].layer}: left as it is; no step lowered its error on held-out samples, {left[0].before:.4g}" in notes
    assert not any(f"layers.{left[0].layer}." in name for name in result.model.patches)
    with torch.no_grad():  # and what lies above it was refit to what that layer really gives
        ids = calibration.load()[0][14:]
        wanted, made = (last_hidden(one, ids) for one in (graph, result.model))
    error = ((made - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert result.refit.layers[-1].after == pytest.approx(float(error), rel=1e-3)


def test_it_starts_from_the_correction_and_its_scale(text: Path, tmp_path: Path) -> None:
    """A stream that a step before has made smaller on purpose is compared with the original over that number."""
    graph, calibration = make_inputs(tmp_path, text)
    pruned = graph.without_layers([1])
    correct = ProjectCompensate(rescale=True, ridge=0.01, shrink=0)
    corrected = run_stage(correct, tmp_path / "correct", model=pruned, calibration=calibration)
    made = {"compensation": corrected.compensation.content()}
    assert abs(next(iter(corrected.compensation.scales.values())) - 1) > 0.02
    context = make_context(tmp_path / "out")
    told = {**vars(context), "lineage": (FinishedStep("correct", "project_compensate", {}, made),)}
    stage = RefitLayers(steps=1, learning_rate=1e-9)
    result: Any = stage.run(stage.Inputs(model=corrected.model, calibration=calibration), type(context)(**told))
    ids = calibration.load()[0][14:]
    with torch.no_grad():
        wanted, entering = (last_hidden(one, ids) for one in (graph, corrected.model))
    wanted = wanted / corrected.compensation.scales[2]
    error = ((entering - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert result.refit.layers[-1].before == pytest.approx(float(error), rel=1e-3)


def test_experts_in_several_parts_stay_and_are_named(text: Path, tmp_path: Path) -> None:
    graph, calibration = make_inputs(tmp_path, text, "mixtral")
    notes: list[str] = []
    stage = RefitLayers(steps=4, layers="next_to_cuts")
    inputs = stage.Inputs(model=graph.without_layers([2]), calibration=calibration)
    result: Any = stage.run(inputs, make_context(tmp_path / "out", notes=notes))
    assert any("not refit, as the checkpoint stores them in several parts: mlp.experts" in note for note in notes)
    assert result.model.patches
    assert not any("experts" in name for name in result.model.patches)


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)))
    return tmp_path


def refit_of(result: Result) -> dict[str, Any]:
    events = [json.loads(line) for line in result.stdout.splitlines()]
    found = next(event for event in events if event["event"] == "step_finished" and event["stage"] == "refit_layers")
    return {name: found["outputs"][name] for name in ("refit", "model")}


def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = refit_of(gradmap("run", "r.yaml", "--json", "--store", "whole"))
    real, refit = refit_layers.refit_layer, []  # type: ignore[var-annotated]

    def run(streams: Any, layer: int, *rest: Any) -> Any:
        if len(refit) == 1:
            refit.append("killed")
            raise KeyboardInterrupt
        refit.append(layer)
        return real(streams, layer, *rest)

    monkeypatch.setattr(refit_layers, "refit_layer", run)
    assert gradmap("run", "r.yaml", "--json").exit_code == 130
    assert list(Path(".gradmap/units").glob("refit_layers-*.safetensors"))
    made = refit_of(gradmap("run", "r.yaml", "--json"))
    assert refit == [0, "killed", 2]
    assert made["refit"] == wanted["refit"]
    digests = [{name: file["sha256"] for name, file in one["model"]["patches"].items()} for one in (made, wanted)]
    assert digests[0] == digests[1] != {}
    assert not list(Path(".gradmap/units").glob("refit_layers-*"))  # its result holds them


@pytest.mark.parametrize("damage", ["", "a tensor", "a number", "all"])
def test_a_layer_goes_on_from_the_step_that_was_kept(damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bytes; what is damaged is not used, and the layer is refit from its first step."""
    wanted = refit_of(gradmap("run", "r.yaml", "--json", "--store", "whole"))
    real, steps = fitting.Fitting._differentiate, []  # type: ignore[var-annotated]

    def differentiate(self: Any, numbers: Any) -> Any:
        steps.append(self._layer)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(self, numbers)

    monkeypatch.setattr("gradmap_pipeline.correction.kept_state.SECONDS", 0.0)
    monkeypatch.setattr("gradmap_pipeline.correction.kept_state._WRITES", 0)
    monkeypatch.setattr(fitting.Fitting, "_differentiate", differentiate)
    assert gradmap("run", "r.yaml", "--json").exit_code == 130
    (state,) = Path(".gradmap/units").rglob("state.json")
    assert json.loads(state.read_text())["state"]["numbers"]["step"] == 4
    if damage == "a tensor":
        tensor = sorted(state.parent.rglob("*.safetensors"))[1]
        tensor.write_bytes(tensor.read_bytes()[:-1] + b"x")
    elif damage == "a number":
        state.write_text(state.read_text().replace('"step": 4', '"step": 2'))
    elif damage:
        state.write_text("{}")
    taken = len(steps)
    made = refit_of(gradmap("run", "r.yaml", "--json"))
    assert steps[taken:].count(steps[0]) == (6 if damage else 2)
    assert made["refit"] == wanted["refit"]
    digests = [{name: file["sha256"] for name, file in one["model"]["patches"].items()} for one in (made, wanted)]
    assert digests[0] == digests[1] != {}
    assert not list(Path(".gradmap/units").rglob("state.json"))


def test_a_damaged_unit_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = refit_of(gradmap("run", "r.yaml", "--json", "--store", "whole"))
    real = RefitLayers._count
    monkeypatch.setattr(RefitLayers, "_count", lambda *_: (_ for _ in ()).throw(StageError("stopped at the end")))
    assert "stopped at the end" in gradmap("run", "r.yaml").output
    for file in Path(".gradmap/units").glob("refit_layers-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    monkeypatch.setattr(RefitLayers, "_count", real)
    assert refit_of(gradmap("run", "r.yaml", "--json"))["refit"] == wanted["refit"]


def test_progress_tells_the_loss(folder: Path) -> None:
    result = gradmap("run", "r.yaml", "--json", "--set", "refit_layers.steps=200")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    details = [event["detail"] for event in events if event["event"] == "progress" and event["step"] == "refit_layers"]
    assert any(detail.startswith("layer ") and ", loss 0." in detail and ", held out 0." in detail for detail in details)


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (
            ["refit_layers.batch_size=15"],
            2,
            "found 15; the calibration set has 16 samples, and one in 8 is held out: at most 14 are",
        ),
        (["calibrate.samples=7"], 2, "the calibration set has 7 samples, and one in 8 is held out; calibrate on at least 8"),
        (
            ["refit_layers.learning_rate=1"],
            2,
            "option 'learning_rate': found 1, accepted: a number above 0 and below 1",
        ),
        (["refit_layers.steps=0"], 2, "option 'steps': found 0, accepted: at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(folder: Path, changes: list[str], code: int, said: str) -> None:
    result = gradmap("check", "r.yaml", *(part for change in changes for part in ("--set", change)))
    assert result.exit_code == code
    assert said in result.output


@pytest.mark.full
def test_memory_that_does_not_suffice_is_refused_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model", hidden_size=512, intermediate_size=8192)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(tmp_path / "model")).replace("TEXT", str(text)))
    assert gradmap("plan", "r.yaml", "--memory", "3GiB").exit_code == 0
    monkeypatch.setattr("gradmap_pipeline.correction.refit._STATE", 1 << 14)  # more than what other tests have left in memory
    result = gradmap("plan", "r.yaml", "--memory", "3GiB")
    assert result.exit_code == 3
    assert "one layer and what is computed with it (" in result.output
    assert "lower 'batch_size', or allow " in result.output


def test_memory_that_does_not_suffice_is_refused_by_the_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, calibration = make_inputs(tmp_path, text)
    stage = RefitLayers(steps=1)
    context = make_context(tmp_path / "out", memory=resident_bytes() + (100 << 20))
    monkeypatch.setattr("gradmap_pipeline.correction.refit._STATE", 1 << 20)
    message = r"refitting the largest layer takes .* GiB besides its weights, .* are left for that; lower 'batch_size', lower 'sequ"
    with pytest.raises(CapacityError, match=message):
        stage.run(stage.Inputs(model=graph.without_layers([1]), calibration=calibration), context)


PEAK = """
import json, sys
from pathlib import Path
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.machine.memory import give_back, tune_allocator
from gradmap_pipeline.testing import make_context, run_stage
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.refit_layers import RefitLayers

def read(field):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":")).split()[1]) << 10

tune_allocator(is_tight=True)
folder, draw = Path(sys.argv[1]), {"dataset": {"path": sys.argv[2]}, "samples": 8, "sequence_length": 16}
for name, allowed in (("small", 1 << 40), ("model", int(sys.argv[3]) << 20)):
    graph = open_folder(folder / name)
    calibration = run_stage(Calibrate.model_validate(draw), folder / f"{name}-text", model=graph).calibration
    stage = RefitLayers(steps=2)
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the system forgets the peak
    resident = read("VmRSS")
    context = make_context(folder / f"{name}-out", memory=resident + allowed)
    stage.run(stage.Inputs(model=graph.without_layers([1]), calibration=calibration), context)
print(json.dumps(read("VmHWM") - resident))
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the counters of /proc are Linux's")
def test_the_memory_allowed_is_kept_to(text: Path, tmp_path: Path) -> None:
    """Six layers of 16 MiB, of which one with its optimiser takes 80 MiB more; the layers do not stay beside that."""
    make_model(tmp_path / "small")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 64}
    make_model(tmp_path / "model", **sizes, num_key_value_heads=8)
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(text), "250"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 80 << 20 < int(done.stdout) < 250 << 20


def test_a_model_that_has_all_its_layers_is_refused(text: Path, tmp_path: Path) -> None:
    graph, calibration = make_inputs(tmp_path, text)
    with pytest.raises(StageError, match="has all its layers, so there is nothing to refit; put prune before this step"):
        run_stage(RefitLayers(), tmp_path / "out", model=graph, calibration=calibration)


def test_a_loss_that_is_not_finite_is_told(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, calibration = make_inputs(tmp_path, text)
    monkeypatch.setattr("gradmap_pipeline.correction.fitting.Fitting._differentiate", lambda *_: (math.inf, {}))
    message = "the loss of layer 0 is not finite at step 1 of 5 in float32; lower 'learning_rate'"
    with pytest.raises(StageError, match=message):
        run_stage(RefitLayers(steps=5), tmp_path / "out", model=graph.without_layers([1]), calibration=calibration)


def test_weights_that_are_not_finite_are_named(text: Path, tmp_path: Path) -> None:
    graph, calibration = make_inputs(tmp_path, text)
    from gradmap_pipeline import TensorFile

    name = "model.layers.2.mlp.down_proj.weight"
    broken = graph.stored_tensor(name)
    file = TensorFile.save({name: torch.full(broken.shape, math.nan)}, tmp_path / "broken.safetensors")
    pruned = graph.without_layers([1]).with_patches({name: file}, "broken")
    with pytest.raises(StageError, match=rf"the error of layer 2 is not a finite number: the tensor '{name}' of layer 2"):
        run_stage(RefitLayers(steps=1), tmp_path / "out", model=pruned, calibration=calibration)


@pytest.mark.full
def test_perplexity_falls_below_that_of_the_closed_form(tmp_path: Path) -> None:
    """On text held out, of the built-in model without a quarter of its layers."""
    model = open_model(ModelSource(builtin="docs-llama"))
    draw = Calibrate.model_validate({"dataset": {"builtin": "calibration"}, "samples": 64, "sequence_length": 128})
    calibration = run_stage(draw, tmp_path / "calibrate", model=model).calibration
    pruned = model.without_layers([4, 6, 8])
    corrected = run_stage(ProjectCompensate(), tmp_path / "correct", model=pruned, calibration=calibration).model
    refit = run_stage(RefitLayers(steps=100), tmp_path / "refit", model=corrected, calibration=calibration).model
    read = Evaluate.model_validate({"dataset": {"builtin": "heldout"}, "samples": 32, "sequence_length": 128})
    losses = [
        run_stage(read, tmp_path / f"evaluate-{number}", model=one).evaluation.loss
        for number, one in enumerate((pruned, corrected, refit))
    ]
    assert losses[0] > losses[1] > losses[2] + 0.05
