"""What a plan says a run takes: sizes are exact, operations follow formulas, no weight is read, what does not fit is said."""

from __future__ import annotations

import json
import os
import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from gradmap_plugins.lookahead_score import LookaheadScore
from tiny import make_model, make_text
from typer.testing import CliRunner, Result

from gradmap_pipeline.checkpoint.checkpoint import read_header
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.cost.estimate import Estimate
from gradmap_pipeline.cost.machine_speed import time_call
from gradmap_pipeline.cost.model_costs import ModelCosts
from gradmap_pipeline.machine.machine import Machine
from gradmap_pipeline.machine.memory import give_back, resident_bytes
from gradmap_pipeline.report.cost_table import print_costs
from gradmap_pipeline.run import costs
from gradmap_pipeline.run.costs import PlanCosts
from gradmap_pipeline.sweep import layerwise, weight_sources
from gradmap_pipeline.text import format_seconds

RECIPE = """\
version: 1
model: {path: model}
steps:
  - use: evaluate
    id: evaluate_dense
    with: {dataset: {path: text.txt}, samples: 8, sequence_length: 24}
  - use: calibrate
    with: {dataset: {path: text.txt}, samples: 8, sequence_length: 24}
  - use: gradmap_score
    with: {layers: 2, protect_first: 0, protect_last: 0}
  - use: prune
    with: {layers: 2}
  - use: project_compensate
  - use: evaluate
    with: {dataset: {path: text.txt}, samples: 8, sequence_length: 24, max_perplexity_ratio: 100}
  - use: export
    with: {to: out}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model(tmp_path / "model")
    make_text(tmp_path / "text.txt")
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def costs_of(*arguments: str) -> dict[str, dict[str, object]]:
    result = gradmap("plan", "r.yaml", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return {step["step"]: step for step in json.loads(result.stdout)["steps"]}


def write_plugin(folder: Path, method: str = "") -> None:
    (folder / "mine.py").write_text(
        "from pydantic import BaseModel\n"
        "from gradmap_pipeline import Context, ModelGraph, Stage, hookimpl\n"
        "class Mine(Stage):\n"
        '    """Hand the model on."""\n'
        '    name = "mine"\n'
        "    class Inputs(BaseModel):\n        model: ModelGraph\n"
        "    class Outputs(BaseModel):\n        model: ModelGraph\n" + method + "@hookimpl\n"
        "def gradmap_stages():\n    return [Mine]\n"
    )


def test_sizes_are_those_of_the_run(folder: Path) -> None:
    said = costs_of()
    assert gradmap("run", "r.yaml", "--quiet").exit_code == 0
    exported = read_header(Path("out/model.safetensors"))
    assert said["model"]["parameters"] == open_folder(Path("model")).count_parameters()
    assert said["prune"]["parameters"] == sum(tensor.elements for tensor in exported.values())
    assert said["export"]["estimate"]["bytes_written"] == sum(tensor.size for tensor in exported.values())
    assert said["model"]["estimate"]["bytes_read"] == open_folder(Path("model")).size_bytes
    assert not [step for step, cost in said.items() if cost["estimate"] is None]


def test_no_weight_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was loaded")

    monkeypatch.setattr(weight_sources, "load_rounded", refuse)
    assert costs_of()["gradmap_score"]["estimate"]["seconds"] > 0
    with pytest.raises(AssertionError, match="a tensor was loaded"):
        layerwise.LayerwiseModel(open_folder(Path("model")))


def test_tensors_of_whole_numbers(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "model" / "model.safetensors"
    save_file(
        {**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3, dtype=torch.long)}, file, {"format": "pt"}
    )
    assert costs_of("--dtype", "bfloat16")["evaluate"]["estimate"]["flops"] > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('width')", "step 'mine': estimate() of stage 'mine' (mine.py) failed: KeyError: 'width'"),
        ("return 3", "step 'mine': estimate() of stage 'mine' (mine.py) must return an Estimate or None, got 3"),
    ],
)
def test_a_stage_whose_estimate_fails_is_named(body: str, message: str, folder: Path) -> None:
    write_plugin(folder, f"    def estimate(self, inputs, costs):\n        {body}\n")
    (folder / "r.yaml").write_text(RECIPE + "  - use: mine\n")
    result = gradmap("plan", "r.yaml", "--plugin", "mine.py")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_of_unknown_depth_is_not_guessed_at(folder: Path) -> None:
    write_plugin(folder)
    (folder / "r.yaml").write_text(
        "version: 1\nmodel: {path: model}\nsteps:\n  - use: mine\n  - use: prune\n    with: {layers: [1]}\n"
        "  - use: evaluate\n    with: {dataset: {path: text.txt}, samples: 8, sequence_length: 24}\n"
    )
    assert costs_of("--plugin", "mine.py")["evaluate"]["estimate"] is None


def test_a_model_that_cannot_be_tried(folder: Path) -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "nothing_known"}))
    result = gradmap("plan", "r.yaml")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "this transformers has no model type 'nothing_known', which" in line


def test_no_memory_at_all_is_a_mistake(folder: Path) -> None:
    assert gradmap("plan", "r.yaml", "--memory", "0").exit_code == 2


def test_operations_follow_the_formula(folder: Path) -> None:
    """A llama layer: 2 for each weight and token; attention: 4 T² for each head's width."""
    costs = ModelCosts(Path("model"), "model", None, Machine(), folder)
    weights = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64
    tokens = 24
    layer, head = costs.benchmark.layer_pass(8, tokens), costs.benchmark.head_pass(8, tokens)
    assert layer.flops == layer.backward_flops == 2 * weights * tokens + 4 * tokens**2 * 32
    assert costs.benchmark.layer_pass(8, tokens, weight_gradients=True).backward_flops == 2 * layer.flops
    assert head.flops == 2 * 32 * 300 * tokens
    once = costs.forward_sweep(4, 8, tokens)  # and the first batch, which is all of them, to warm up
    assert once.flops == pytest.approx(2 * 8 * (4 * layer.flops + head.flops))
    assert costs.forward_sweep(4, 8, tokens, losses=False).flops == pytest.approx(2 * 8 * 4 * layer.flops)
    two = costs.backward_sweeps([4, 3], 8, tokens)
    assert "graphs kept" in two.how
    assert two.flops == pytest.approx(8 * (7 * (layer.flops + layer.backward_flops) + 2 * (head.flops + head.backward_flops)))


def test_the_first_step_pays_for_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(ModelCosts):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.start_seconds = 1000.0

    monkeypatch.setattr(costs, "ModelCosts", Slow)
    slow = [step for step, cost in costs_of().items() if cost["estimate"]["seconds"] > 1000]
    assert slow == ["evaluate_dense"]


def test_the_dense_model_is_counted_once(folder: Path) -> None:
    """The limit of the last evaluation compares with the dense model, which the first one has scored."""
    with_dense = costs_of()["evaluate"]["estimate"]["flops"]
    recipe = Path("r.yaml")
    first_alone = recipe.read_text().split("  - use: evaluate\n    id", 1)
    recipe.write_text(first_alone[0] + first_alone[1][first_alone[1].index("  - use: calibrate") :])
    assert costs_of()["evaluate"]["estimate"]["flops"] > 2 * with_dense


def test_what_does_not_fit_is_said_before_the_run(folder: Path) -> None:
    result = gradmap("plan", "r.yaml", "--memory", "150MiB")
    assert result.exit_code == 3
    assert "need" in result.stderr
    assert "--memory" in result.stderr
    assert not (folder / ".gradmap").exists()


def test_each_step_that_does_not_fit_is_named(folder: Path) -> None:
    """Memory for the embeddings, not for a sweep."""
    costs_of()  # libraries are in memory from here on
    give_back()  # as the plan does, before it looks at what is resident
    result = gradmap("plan", "r.yaml", "--memory", str(resident_bytes() + (60 << 20)))
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert "steps 'evaluate_dense', 'gradmap_score', " in result.stderr
    assert " need more memory; most of all " in result.stderr
    assert "does not fit" in result.stdout


@pytest.mark.full
def test_a_correction_that_does_not_fit_names_the_option_that_helps(folder: Path) -> None:
    """In fp64, sums over pairs of 16384 inputs take 2 GiB and their solution 0.19 GiB; sums over pairs of 32 outputs take 8 KiB."""
    make_model(folder / "model", intermediate_size=16384, num_hidden_layers=3)
    memory = ("--memory", str(resident_bytes() + (1 << 30)))
    result = gradmap("plan", "r.yaml", *memory)
    assert result.exit_code == 3
    assert "step 'project_compensate': one layer and what is computed with it (2.19 GiB) need" in result.stderr
    assert "use space: output, or allow " in result.stderr
    assert gradmap("plan", "r.yaml", *memory, "--set", "project_compensate.space=output").exit_code == 0


def test_a_correction_of_attention_is_counted_by_its_own_inputs(folder: Path) -> None:
    make_model(folder / "model", intermediate_size=2048)
    both, one = (
        costs_of("--set", f"project_compensate.attention={attention}")["project_compensate"]["estimate"]
        for attention in ("true", "false")
    )
    assert one["flops"] < both["flops"] < 1.1 * one["flops"]  # type: ignore[index, operator]


@pytest.mark.parametrize("stage", ["project_compensate", "refit_layers"])
def test_a_recipe_that_names_the_layers_to_remove_is_planned_for_those_above(stage: str, folder: Path) -> None:
    recipe = """\
version: 1
model: {path: model}
steps:
  - use: calibrate
    with: {dataset: {path: text.txt}, samples: 8, sequence_length: 24}
  - use: prune
    with: {layers: [LAYER]}
  - use: STAGE
"""
    flops = []
    for layer in (0, 2, 3):
        Path("r.yaml").write_text(recipe.replace("LAYER", str(layer)).replace("STAGE", stage))
        flops.append(costs_of()[stage]["estimate"]["flops"])  # type: ignore[index]
    below, above, last = flops
    assert last < above
    assert last < below


def test_a_search_that_looks_ahead_counts_the_head_and_its_predictions(folder: Path) -> None:
    """Which are most of it where words are many."""
    stage, costs = LookaheadScore(layers=2, sample_share=1.0), ModelCosts(Path("model"), "model", None, Machine(), folder)
    few = stage.estimate_sweeps(4, 12, 24, costs)
    make_model(folder / "many", vocab_size=3000)
    costs = ModelCosts(Path("many"), "many", None, Machine(), folder)
    many = stage.estimate_sweeps(4, 12, 24, costs)
    assert few is not None
    assert many is not None
    tries = 2 + 2 + 2  # both layers that may go, in each decision; the original model, and what is left after the first
    assert many.flops - few.flops == pytest.approx(4 * tries * 2 * 32 * 2700 * 24)  # four samples are compared
    assert few.disk_bytes == 4 * 32 * (64 + 32) * 4  # corrected weights, at the down-projection and the attention's output
    assert few.bytes_written == few.disk_bytes // 2 + (2 + 2) * 32 * 64 * 4
    assert many.lines["hidden states"] - few.lines["hidden states"] == 2 * 4 * 24 * 2700


def test_text_takes_the_memory_of_its_tokenizer(folder: Path) -> None:
    costs = ModelCosts(Path("model"), "model", None, Machine(), folder)
    before = costs.text(1000)
    with Path("model/tokenizer.json").open("a") as file:
        file.write(" " * 100_000)
    assert costs.text(1000).peak_bytes - before.peak_bytes == 14 * 100_000


HUB = "{dataset: {id: some/data}, samples: 1000000000000, sequence_length: 24}"


def test_ids_that_fit_no_memory_are_said(folder: Path) -> None:
    (folder / "r.yaml").write_text(RECIPE.split("  - use: evaluate", maxsplit=1)[0] + f"  - use: calibrate\n    with: {HUB}\n")
    result = gradmap("plan", "r.yaml", "--memory", "2GiB")
    assert result.exit_code == 3
    message = "error: step 'calibrate': the ids of 24,000,000,000,000 tokens need 894069.67 GiB, over the 2.00 GiB allowed; lower "
    assert message + "'samples' or 'sequence_length', or allow 900000GiB or more with --memory" in result.stderr


def test_samples_that_no_text_gives_are_refused(folder: Path) -> None:
    size = (folder / "text.txt").stat().st_size
    for samples in ("1000000000000", str(64 * size // 24 + 1)):
        text = RECIPE.replace("samples: 8", f"samples: {samples}", 2)
        for command in ("check", "plan", "run"):
            (folder / "r.yaml").write_text(text)
            result = gradmap(command, "r.yaml")
            assert result.exit_code == 2
            message = f"samples': {int(samples):,} samples of 24 tokens are more than the {size:,} bytes of 'text.txt' can give"
            assert [line.split(": ", 2)[2].split(";")[0] for line in result.stderr.splitlines()] == [
                f"step 'evaluate_dense': option '{message}",
                f"step 'calibrate': option '{message}",
            ]
    (folder / "r.yaml").write_text(RECIPE.replace("samples: 8", f"samples: {64 * size // 24}"))
    result = gradmap("check", "r.yaml")
    assert result.exit_code == 2, "the text is small enough to be tokenised"
    assert "option 'samples': the data set gives only " in result.stderr
    text = RECIPE.replace("samples: 8", "packing: none, samples: " + str(size + 1))
    (folder / "r.yaml").write_text(text)
    assert gradmap("check", "r.yaml").exit_code == 2
    (folder / "r.yaml").write_text(text.replace(str(size + 1), "1"))
    assert gradmap("check", "r.yaml").exit_code == 0


def test_what_no_disk_holds_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that the memory does not hold go into the store; an export goes where it is written."""
    free = namedtuple("free", ["free"])
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda path: free(1 << 10))
    result = gradmap("plan", "r.yaml")
    assert result.exit_code == 3
    assert "step 'export': what it writes needs 148 KiB" in result.stderr
    assert f"and {str(folder)!r} has 1 KiB free; name a folder on another disk" in result.stderr
    assert "does not fit" in result.stdout
    assert "'gradmap_score'" not in result.stderr, "its hidden states fit the memory"


def test_hidden_states_that_no_disk_holds_are_said(folder: Path) -> None:
    """Of half of the samples, five boundaries and a gradient, less what the memory holds."""
    (folder / "r.yaml").write_text(
        RECIPE.split("  - use: evaluate", maxsplit=1)[0]
        + f"  - use: calibrate\n    with: {HUB}\n  - use: gradmap_score\n    with: {{layers: 1, metric: weight_gradient}}\n"
    )
    result = gradmap("plan", "r.yaml", "--memory", "900TiB")
    assert result.exit_code == 3
    said = re.search(r"step 'gradmap_score': what it keeps in files for its own time needs ([0-9.]+) GiB, and ", result.stderr)
    assert said is not None, result.stderr
    assert float(said[1]) == pytest.approx((10**12 / 2) * 24 * 32 * 4 * 6 / 2**30 - 900 * 2**10, rel=1e-4)
    assert (
        "name another disk with --store; with fewer samples, or more with --memory, fewer hidden states lie there" in result.stderr
    )


def test_disk_that_a_sweep_needs(folder: Path) -> None:
    """As much as lies there at once, not all that is ever written."""
    costs = ModelCosts(Path("model"), "model", None, Machine(), folder)
    many = 10**9
    sample = costs.needs(4, 1, 24).boundary_bytes
    backward = costs.backward_sweeps([4, 3], many, 24, divisible=False)
    assert 6 * sample * many > backward.disk_bytes > 5 * sample * many  # five boundaries and a gradient
    assert backward.disk_bytes < backward.bytes_written
    assert costs.forward_sweep(4, 8, 24).disk_bytes == 0


@pytest.mark.parametrize(
    ("busy", "threads", "told"), [(3.8, 2, True), (3.8, 4, True), (1.6, 2, False), (1.6, 4, True), (0.0, 16, False)]
)
def test_a_plan_says_when_other_programs_made_it_slow(
    busy: float, threads: int, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    print_costs(PlanCosts(8 << 30, [], threads=threads, cores=4, busy_cores=busy))
    shown = " ".join(capsys.readouterr().out.split())
    assert (f"Other programs use {busy} of 4 cores now, so times are longer than on an idle machine." in shown) == told
    assert ("Times are of an idle machine" in shown) != told


def test_a_plan_looks_what_other_programs_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: 95.0)
    known = json.loads(gradmap("plan", "r.yaml", "--json").stdout)
    assert (known["threads"], known["cores"], known["busy_cores"]) == (torch.get_num_threads(), 4, 3.8)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3600 * 71, "71 h 00 min"), (86400 * 3, "3 days"), (86400 * 1095, "3 years"), (1e12, "31,709 years")]
)
def test_absurd_times_are_told_in_years(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_bytes_read_are_those_planned(folder: Path) -> None:
    """Of a large model, more than of a small one: what steps import and write down is not planned."""
    make_model(folder / "large", hidden_size=128, intermediate_size=512)
    recipe = """\
version: 1
model: {path: MODEL}
steps:
  - use: calibrate
    with: {dataset: {path: text.txt}, samples: 16, sequence_length: 24}
  - use: prune
    with: {layers: [0]}
  - use: project_compensate
  - use: refit_layers
    with: {steps: 20, learning_rate: 0.005}
  - use: distill
    with: {dataset: {path: text.txt}, samples: 16, sequence_length: 24, steps: 6, learning_rate: 1.0e-5, batch_size: 4, top_k: 4,
           weights: all}
  - use: evaluate
    with: {dataset: {path: text.txt}, samples: 8, sequence_length: 24}
"""
    this, runs = psutil.Process(), []
    for number, name in enumerate(("model", "model", "large")):  # the first imports, the second shows what else is read
        Path("r.yaml").write_text(recipe.replace("MODEL", name))
        planned = sum(int(step["estimate"]["bytes_read"]) for step in costs_of().values())  # type: ignore[call-overload]
        before = this.io_counters().read_chars
        result = gradmap("run", "r.yaml", "--store", f"store-{number}")
        assert result.exit_code == 0, result.output
        assert result.stdout.count("best after step") == 4, result.stdout  # a plan counts what all of them write
        runs.append((this.io_counters().read_chars - before, planned))
    _, (small, planned_small), (large, planned_large) = runs
    assert large - small == pytest.approx(planned_large - planned_small, rel=0.1)


def test_less_memory_reads_more(folder: Path) -> None:
    """The plan says which way a sweep takes, as the run chooses it."""
    costs = ModelCosts(Path("model"), "model", None, Machine(), folder)
    roomy = costs.backward_sweeps([4, 3], 8, 24)
    needs = costs.needs(4, 8, 24)
    costs.benchmark._needs[24] = replace(needs, all_layer_bytes=1 << 60)  # as if the layers were large
    narrow = costs.backward_sweeps([4, 3], 8, 24)
    costs.benchmark._needs[24] = replace(needs, all_layer_bytes=1 << 60, has_slow_reads=True)
    assert costs.backward_sweeps([4, 3], 8, 24).how == "layers read ahead"
    assert roomy.how == "layers stay in memory, graphs kept"
    assert narrow.how == "layers read again"
    assert roomy.bytes_read == costs.stored_rest_bytes + needs.stored_bytes
    ends = needs.stored_embedding_bytes + needs.stored_head_bytes  # read anew for each decision
    opened = costs.stored_rest_bytes - ends
    assert narrow.bytes_read == opened + (2 * needs.stored_bytes + ends) * (4 + 3) // 4
    assert narrow.flops > roomy.flops


def test_a_model_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    make_text(tmp_path / "text.txt")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("path: model", "id: some/model"))
    result = gradmap("plan", "r.yaml")
    assert result.exit_code == 0
    assert "when the model is on this machine" in result.stdout
    assert gradmap("plan", "r.yaml", "--json").stdout == "null\n"


def test_a_stage_that_says_nothing(folder: Path) -> None:
    write_plugin(folder)
    (folder / "r.yaml").write_text(RECIPE + "  - use: mine\n")
    assert costs_of("--plugin", "mine.py")["mine"]["estimate"] is None
    assert gradmap("plan", "r.yaml", "--plugin", "mine.py").exit_code == 0


def test_estimates_add_up() -> None:
    one = Estimate(5, 10, 1, 100.0, 2.0, "so")
    two = Estimate(7, 1, 0, 1.0, 1.0)
    assert one + two == Estimate(7, 11, 1, 101.0, 3.0, "so")
    assert two * 3 == Estimate(7, 3, 0, 3.0, 3.0)


def test_a_long_call_is_made_once() -> None:
    calls: list[int] = []
    time_call(lambda: calls.append(1), at_least=0.0)
    assert len(calls) == 1
    time_call(lambda: calls.append(1), at_least=10.0, at_most=5)
    assert len(calls) == 1 + 1 + 5
