"""A pruned model trained as a whole: its parts against formulas in fp64, and what holds of every run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins import distill
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.distill import Distill
from tiny import make_model
from typer.testing import CliRunner, Result

from gradmap_pipeline import (
    CapacityError,
    ModelGraph,
    StageError,
    TrainingNeeds,
    find_top_choices,
    measure_training_needs,
    open_sweep,
    training_bytes,
)
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.whole import load_whole, name_on_disk
from gradmap_pipeline.cli import app
from gradmap_pipeline.correction import sliced_loss, training
from gradmap_pipeline.correction.distilling import divergence_from, loss_on
from gradmap_pipeline.correction.training import add_lora
from gradmap_pipeline.correction.training_curve import thin_out
from gradmap_pipeline.machine.memory import resident_bytes
from gradmap_pipeline.sweep.needs import noting_saved, sum_saved
from gradmap_pipeline.testing import make_context, run_stage

pytestmark = pytest.mark.full

RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: prune
    with: {layers: [1]}
  - use: distill
    with: {dataset: {path: TEXT}, samples: 24, sequence_length: 16, steps: 10, batch_size: 4, learning_rate: 0.003}
"""


def test_divergence_is_that_of_the_likeliest_tokens_and_the_rest() -> None:
    """Σ p log(p/q) over the choices and one outcome for all others, in fp64; with all tokens chosen, torch's own KL."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    logs, choices = teacher.log_softmax(-1).topk(4, dim=-1)
    a, b = p.gather(-1, choices), q.gather(-1, choices)
    rest_a, rest_b = 1 - a.sum(-1), 1 - b.sum(-1)
    expected = (a * (a / b).log()).sum(-1) + rest_a * (rest_a / rest_b).log()
    torch.testing.assert_close(divergence_from(student, choices, logs).double(), expected, rtol=1e-5, atol=1e-6)
    logs, choices = teacher.log_softmax(-1).topk(11, dim=-1)
    whole = torch.nn.functional.kl_div(q.log(), p.log(), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence_from(student, choices, logs).double(), whole, rtol=1e-5, atol=1e-6)
    assert bool((expected <= whole + 1e-9).all())


def test_certain_predictions_have_no_infinite_divergence() -> None:
    """A teacher and a student that leave nothing to all other tokens."""
    logits = torch.zeros(1, 1, 8)
    logits[..., 2] = 200.0
    logs, choices = logits.log_softmax(-1).topk(1, dim=-1)
    student = logits.clone().requires_grad_()
    loss = divergence_from(student, choices, logs).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_loss_on_text_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 4, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    expected = -logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss_on(logits, ids[:, 1:]).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sliced_loss_is_the_whole_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, times a factor, of the mean over all positions but the last, in fp64; the last position has none."""
    monkeypatch.setattr(sliced_loss, "count_losses_at_once", lambda _: 3 * 7)  # three positions at a time, of five
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 6, 7, generator=generator).to(dtype)
    ids = torch.randint(7, (2, 6), generator=generator)
    logits = given.clone().requires_grad_()

    def losses(part: torch.Tensor, sequence: int, positions: slice) -> torch.Tensor:
        assert part.dtype == torch.float32
        return loss_on(part, ids[sequence, 1:][positions])

    mean = sliced_loss.mean_by_slices(logits, losses)
    (3 * mean).backward()
    exact = given.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (3 * expected).backward()
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(mean.detach().double(), expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)
    assert not logits.grad[:, -1].any()
    with torch.no_grad():
        assert float(sliced_loss.mean_by_slices(logits, losses)) == float(mean.detach())


@pytest.mark.parametrize("slices", [False, True])
def test_choices_of_the_teacher_are_those_of_the_whole_model(
    slices: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slices:
        monkeypatch.setattr("gradmap_pipeline.sweep.head_losses.LOGITS_AT_ONCE", 4 * 300 * 3)
    graph = open_folder(llama)
    ids = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(0))
    with open_sweep(graph, (ids, torch.ones_like(ids)), make_context(tmp_path)) as sweep:
        parts = list(find_top_choices(sweep, 5))
    choices, logs = (torch.cat([part[at] for part in parts]) for at in (0, 1))
    module: Any = load_whole(graph, "float32")
    expected = module.double()(input_ids=ids).logits[:, :-1].log_softmax(-1).topk(5, dim=-1)
    assert choices.dtype == torch.int32
    torch.testing.assert_close(logs.double(), expected.values, rtol=1e-4, atol=1e-5)
    assert torch.equal(choices.long(), expected.indices)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_updates_are_w_plus_b_a(architecture: str, tmp_path: Path) -> None:
    graph = open_folder(make_model(tmp_path / "model", architecture)).without_layers([1])
    module: Any = load_whole(graph, "float32")
    names = name_on_disk(module, graph)
    before = {name: parameter.detach().double().clone() for name, parameter in module.named_parameters()}
    model = add_lora(module, names, rank=4, alpha=6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    parts = {name.removeprefix("base_model.model."): parameter.detach().double() for name, parameter in model.named_parameters()}
    ids = torch.randint(300, (1, 8), generator=generator)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)
    changed = 0
    for name, parameter in merged.named_parameters():
        expected, stem = before[name], name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in parts:
            product = parts[f"{stem}.lora_B.default.weight"] @ parts[f"{stem}.lora_A.default.weight"] * 6 / 4
            expected = expected + (product.T if architecture == "gpt2" else product)
            changed += 1
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-5)
    assert changed == 3 * (7 if architecture == "llama" else 4)


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_loss_falls_and_parameters_stay_as_many(weights: str, llama: Path, text: Path, tmp_path: Path) -> None:
    graph = open_folder(llama)
    pruned = graph.without_layers([1])
    options = {"dataset": {"path": text}, "samples": 24, "sequence_length": 16, "steps": 12, "batch_size": 4}
    stage = Distill.model_validate({**options, "learning_rate": 3e-3, "weights": weights, "teacher_share": 0.5})
    states = torch.get_rng_state()
    result = run_stage(stage, tmp_path / "out", model=pruned)
    assert torch.equal(states, torch.get_rng_state())
    assert result.distillation.after < 0.98 * result.distillation.before
    assert result.model.count_parameters() == pruned.count_parameters()
    assert result.model.label == "distilled"
    assert any("embed" in name for name in result.model.patches) == (weights == "all")
    assert not (tmp_path / "out" / "training").exists()
    lora = 3 * 16 * sum(32 + size for size in (32, 16, 16, 32, 64, 64, 64))  # of each map (inputs + outputs) · rank
    assert result.distillation.trained_parameters == (lora if weights == "lora" else pruned.count_parameters())


def test_products_are_in_bfloat16_where_the_run_computes_in_it(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, and the losses before and after, are in fp32."""
    real, measure, seen = training.load_whole, training.measure, set()
    measured = []

    def listen(*arguments: Any) -> Any:
        module: Any = real(*arguments)
        projection = module.model.layers[0].mlp.down_proj
        projection.register_forward_hook(lambda at, _, out: seen.add((at.training, at.weight.dtype, out.dtype)))
        return module

    def look(*arguments: Any) -> float:
        before = set(seen)
        seen.clear()
        loss = measure(*arguments)
        measured.append((before, set(seen)))
        seen.clear()
        return loss

    monkeypatch.setattr(training, "load_whole", listen)
    monkeypatch.setattr(training, "measure", look)
    options = {"dataset": {"path": text}, "samples": 24, "sequence_length": 16, "steps": 12, "batch_size": 4}
    stage = Distill.model_validate({**options, "learning_rate": 3e-3, "weights": "all"})
    result = run_stage(stage, tmp_path / "out", dtype="bfloat16", model=open_folder(llama).without_layers([1]))
    single = {(False, torch.float32, torch.float32)}
    assert measured == [(set(), single), ({(is_training, torch.float32, torch.bfloat16) for is_training in (True, False)}, single)]
    assert result.distillation.after < 0.98 * result.distillation.before


def test_text_of_the_model_itself_is_written_by_the_original(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a mix is text, and half is what the model writes: equal to what `calibrate` draws on the original."""
    graph = open_folder(llama)
    mix = {"mix": [{"path": text}, {"self": {}}]}
    drawn = run_stage(Calibrate.model_validate({"dataset": mix, "samples": 16, "sequence_length": 16, "shuffle": False}),
                      tmp_path / "calibration", model=graph).calibration.load()[0]  # fmt: skip
    trained_on = []
    real = distill.train_whole

    def listen(pruned: Any, data: Any, settings: Any, folder: Path, context: Any) -> Any:
        trained_on.append(data[0])
        return real(pruned, data, settings, folder, context)

    monkeypatch.setattr(distill, "train_whole", listen)
    stage = Distill.model_validate({"dataset": mix, "samples": 16, "sequence_length": 16, "steps": 2, "batch_size": 4})
    run_stage(stage, tmp_path / "out", model=graph.without_layers([1]))
    (ids,) = trained_on
    assert torch.equal(ids, drawn.long())


def test_samples_one_after_another_make_the_same_step(llama: Path, text: Path, tmp_path: Path) -> None:
    """Gradients are means over the step's samples, however many of them are in memory at once."""
    pruned = open_folder(llama).without_layers([1])
    options = {"dataset": {"path": text}, "samples": 16, "sequence_length": 16, "steps": 8, "batch_size": 4, "weights": "all"}
    results = [
        run_stage(Distill.model_validate({**options, "samples_at_once": at_once}), tmp_path / str(at_once), model=pruned)
        for at_once in (None, 1, 2)
    ]
    together, *others = results
    assert together.distillation.after < together.distillation.before
    for one in others:
        assert one.distillation.after == pytest.approx(together.distillation.after, rel=1e-5)
        for name, file in one.model.patches.items():
            expected = together.model.patches[name].load()[name]
            assert torch.allclose(file.load()[name], expected, rtol=0, atol=2e-3 * float(expected.abs().max())), name


def test_a_model_that_no_step_betters_is_left(llama: Path, text: Path, tmp_path: Path) -> None:
    """It stops after two looks that are no better, and says so."""
    pruned, notes = open_folder(llama).without_layers([1]), []  # type: ignore[var-annotated]
    options = {"dataset": {"path": text}, "samples": 24, "sequence_length": 16, "steps": 40, "batch_size": 4, "patience": 2}
    stage = Distill.model_validate({**options, "learning_rate": 0.9, "weights": "all"})
    result: Any = stage.run(stage.Inputs(model=pruned), make_context(tmp_path / "out", notes=notes))
    assert (result.distillation.best_step, result.model.patches) == (0, {})
    assert result.distillation.steps < 40
    assert "the model is left as it is; no step lowered its loss on held-out samples" in notes[-1]


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)))
    return tmp_path


def outcome_of(result: Result) -> tuple[dict[str, Any], dict[str, str]]:
    events = [json.loads(line) for line in result.stdout.splitlines()]
    found = next(event for event in events if event["event"] == "step_finished" and event["stage"] == "distill")["outputs"]
    return found["distillation"], {name: file["sha256"] for name, file in found["model"]["patches"].items()}


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_a_killed_run_goes_on_to_the_same_bytes(weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("r.yaml", "--json", "--set", f"distill.weights={weights}")
    wanted = outcome_of(gradmap("run", *options, "--store", "whole"))
    real, calls = training.mixed_loss, []  # type: ignore[var-annotated]

    def lose(model: Any, *rest: Any) -> Any:
        calls.append(model.training)
        if calls.count(True) == 6:
            raise KeyboardInterrupt
        return real(model, *rest)

    monkeypatch.setattr(training, "mixed_loss", lose)
    assert gradmap("run", *options).exit_code == 130
    assert list(Path(".gradmap/units").glob("distill-*/checkpoint-5/complete"))
    checkpoint = next(Path(".gradmap/units").glob("distill-*/checkpoint-5"))
    half = checkpoint.with_name("checkpoint-6")  # as a kill leaves it that comes while one is written
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    monkeypatch.setattr(training, "mixed_loss", lambda model, *rest: (calls.append(model.training), real(model, *rest))[1])
    calls.clear()
    assert outcome_of(gradmap("run", *options)) == wanted
    assert 0 < calls.count(True) <= 5  # not those before the checkpoint
    assert wanted[1]
    assert not list(Path(".gradmap/units").glob("distill-*"))


def test_progress_tells_loss_and_rate(folder: Path) -> None:
    result = gradmap("run", "r.yaml", "--json", "--set", "distill.steps=60", "--set", "distill.patience=60")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    details = [event["detail"] for event in events if event["event"] == "progress" and event["description"] == "train"]
    assert any(detail.startswith("loss ") and "learning rate " in detail for detail in details), details


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("distill.batch_size=22", "option 'batch_size': found 22; of 24 samples 21 are left to train on"),
        ("distill.samples_at_once=3", "option 'samples_at_once': found 3; a step of 4 samples takes one of [1, 2, 4]"),
        ("distill.samples=15", "option 'samples': found 15, accepted: at least 16"),
        ("distill.samples=100000", "option 'samples'"),
        ("distill.teacher_share=1.5", "option 'teacher_share': found 1.5, accepted: a number from 0 to 1, such as 0.5"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(change: str, said: str, folder: Path) -> None:
    result = gradmap("check", "r.yaml", "--set", change)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.full
def test_memory_that_does_not_suffice_is_refused_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model", hidden_size=512, intermediate_size=8192)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(tmp_path / "model")).replace("TEXT", str(text)))
    assert gradmap("plan", "r.yaml", "--memory", "3GiB", "--set", "distill.weights=all").exit_code == 0
    monkeypatch.setattr("gradmap_pipeline.correction.training_memory._LIBRARIES", 1 << 40)
    result = gradmap("plan", "r.yaml", "--memory", "3GiB", "--set", "distill.weights=all")
    assert result.exit_code == 3
    assert "training the whole model takes" in result.output
    assert (
        "use weights: lora, lower 'samples_at_once' or 'sequence_length', take refit_layers, which holds one layer, or allow "
        in result.output
    )


def test_memory_that_does_not_suffice_is_refused_by_the_run(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gradmap_pipeline.correction.training_memory._LIBRARIES", 1 << 40
    )  # whatever other tests have left in memory
    options = {"dataset": {"path": text}, "samples": 16, "sequence_length": 16, "steps": 4, "batch_size": 4}
    stage = Distill.model_validate(options)
    inputs = stage.Inputs(model=open_folder(llama).without_layers([1]))
    with pytest.raises(CapacityError, match=r"training the whole model takes .*, over the .* allowed; lower 'samples_at_once' or"):
        stage.run(inputs, make_context(tmp_path / "out", memory=resident_bytes() + (200 << 20)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_planned_is_what_autograd_keeps(architecture: str, dtype: str, tmp_path: Path) -> None:
    """What one more layer keeps of a batch of 3 in training. gpt2 drops out."""
    graph = open_folder(make_model(tmp_path / "model", architecture, **SIZES[architecture]))
    needs = measure_training_needs(graph, 64, dtype, "cpu")
    more, less = (training_bytes(needs, layers, 0, 0, 3)["activations"] for layers in (3, 2))
    kept = [keep_graph(graph.without_layers(range(layers, 4)), 3, 64, dtype) for layers in (3, 2)]
    assert more - less == pytest.approx(kept[0] - kept[1], rel=0.05)
    maps = sum(tensor.elements for tensor in graph.layer_tensors(0).values() if len(tensor.shape) == 2)
    assert (needs.layer_casts >= 2 * maps) == (dtype == "bfloat16")


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_logits_planned_are_they_and_their_gradient(architecture: str, dtype: str, item: int, tmp_path: Path) -> None:
    """gemma2, which caps its logits, keeps them once more. The last norm keeps some of its own."""
    graph = open_folder(make_model(tmp_path / "model", architecture, hidden_size=8))
    needs = measure_training_needs(graph, 16, dtype, "cpu")
    copies = 3 if architecture == "gemma2" else 2
    assert needs.position_bytes == pytest.approx(copies * 300 * item, rel=0.1)
    assert (needs.head_casts >= 2 * 300 * 8) == (dtype == "bfloat16")


SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    "gpt2": {"n_embd": 128, "n_inner": 384, "n_layer": 4},
}


def keep_graph(graph: ModelGraph, samples: int, tokens: int, dtype: str) -> int:
    """Bytes of the tensors that autograd keeps of a forward pass in training, without the weights."""
    module: Any = load_whole(graph, "float32").requires_grad_().train()
    with noting_saved() as saved, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = module(input_ids=torch.zeros(samples, tokens, dtype=torch.long), use_cache=False).logits
    assert logits.requires_grad
    return sum_saved(saved, module.parameters())


def test_gradients_lie_beside_a_batch_where_several_are_summed() -> None:
    needs = TrainingNeeds(10, 4, layer_bytes=100, layer_casts=7, position_bytes=50, head_casts=3, losses_bytes=1)
    lines = training_bytes(needs, 2, 1000, 100, 2)
    batch = {"activations": 2 * (2 * 100 + 7), "logits": 2 * 10 * 50 + 3 + 1}
    assert lines == {"libraries": 256 << 20, "weights": 4000, "moments": 800, **batch, "gradients": 0, "allocator": 1418 // 16}
    assert training_bytes(needs, 2, 1000, 100, 2, is_summed=True)["gradients"] == 400
    assert training_bytes(needs, 2, 1000, 1000, 2)["gradients"] == 8000 - 1418
    assert training_bytes(needs, 2, 1000, 100, 2, processes=2)["moments"] == 1200


def test_a_loss_that_is_not_finite_is_told(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.mixed_loss
    monkeypatch.setattr(training, "mixed_loss", lambda model, *rest: real(model, *rest) * (math.nan if model.training else 1))
    options = {"dataset": {"path": text}, "samples": 24, "sequence_length": 16, "steps": 4, "batch_size": 4}
    with pytest.raises(StageError, match="the loss is not finite at step 1 of 4; lower 'learning_rate'"):
        run_stage(Distill.model_validate(options), tmp_path / "out", model=open_folder(llama).without_layers([1]))


def test_a_curve_has_few_points_and_every_look() -> None:
    """Of 600 steps, ten a point; a resumed run logs a look twice."""
    history = [{"step": step, "loss": float(step % 10), "learning_rate": 1e-3 / step} for step in range(1, 601)]
    history += [{"step": step, "eval_loss": 1 / step} for step in (60, 120, 120, 600)]
    curve = thin_out(history, 600)
    assert [point.step for point in curve] == list(range(10, 601, 10))
    assert {point.loss for point in curve} == {4.5}
    assert {point.step: point.held_out for point in curve if point.held_out} == {60: 1 / 60, 120: 1 / 120, 600: 1 / 600}
    assert thin_out([{"step": 7, "loss": 2.0, "learning_rate": 0.1}, {"step": 8, "eval_loss": 1.0}], 8)[1].loss is None
    assert thin_out([], 8) == ()


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_experts_that_stay_as_they_are_are_named(weights: str, text: Path, tmp_path: Path) -> None:
    """transformers holds the experts of a layer as one tensor, and the checkpoint each by itself."""
    pruned, notes = open_folder(make_model(tmp_path / "model", "mixtral")).without_layers([1]), []  # type: ignore[var-annotated]
    options = {"dataset": {"path": text}, "samples": 16, "sequence_length": 16, "steps": 8, "batch_size": 4, "weights": weights}
    stage = Distill.model_validate({**options, "learning_rate": 3e-4})
    result: Any = stage.run(stage.Inputs(model=pruned), make_context(tmp_path / "out", notes=notes))
    experts = "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj"
    assert notes[0] == f"not trained, as the checkpoint stores them in several parts: {experts}"
    assert not any("experts" in name for name in result.model.patches)
    assert any("block_sparse_moe.gate.weight" in name for name in result.model.patches) == (weights == "all")
    if result.distillation.best_step:
        least = min(point.held_out for point in result.distillation.curve if point.held_out is not None)
        assert result.distillation.after == pytest.approx(least, rel=1e-3)
