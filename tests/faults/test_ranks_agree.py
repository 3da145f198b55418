"""Several processes come to the same decisions, to the bit, or end together with one message: none goes its own way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from ranks import Ended, run_ranks, torchrun_variables
from tiny import make_model

pytestmark = pytest.mark.full

LOST = (
    "process {} of 2 has ended without a message, as when it is killed or its machine fails. What is finished is kept; run the "
    "same command to go on"
)
PREPARED = """\
version: 1
model: {path: MODEL}
steps:
  - use: calibrate
    with: {dataset: {path: TEXT}, samples: 17, sequence_length: 16}
"""
SCORES = {
    "gradmap_score": "{layers: 2, protect_first: 0, protect_last: 0}",
    "gradmap_score by weights": "{layers: 1, metric: weight_gradient, protect_first: 0, protect_last: 0, sample_share: 1}",
    "taylor_score": "{layers: 2, protect_first: 0, protect_last: 0}",
    "angular_score": "{layers: 2}",
    "shortgpt_score": "{layers: 2}",
    "sleb_score": "{layers: 2}",
    "perplexity_score": "{layers: 2}",
    "lookahead_score": "{layers: 2}",
}
CORRECTIONS = {
    "project_compensate": "{}",
    "project_compensate where it drifted most": "{site: largest_shift}",
    "project_compensate on a rescaled stream": "{rescale: true}",
    "replaceme_compensate": "{ridge: 0.1}",
    "linearpatch_compensate": "{tolerance: 1}",
    "mean_bias": "{}",
    "prunecomp_compensate": "{}",
}
OTHERS = {
    "evaluate": "{dataset: {path: TEXT}, samples: 7, sequence_length: 16}",
    "refit_layers": "{steps: 3}",
    "distill": "{dataset: {path: TEXT}, samples: 16, sequence_length: 16, steps: 3, batch_size: 4, learning_rate: 0.01}",
}
STAGES = {**SCORES, **CORRECTIONS, **OTHERS}
SOME = ("gradmap_score", "project_compensate")
"""Run with `make test`; all are with `make test-slow`."""


def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in names]


PLUGIN = '''
"""Acts in one process, in the middle of a stage, and notes what each process gets from it."""
import json, os, signal, time
from gradmap_pipeline import CapacityError, NoSiteError, StageError, hookimpl
from gradmap_pipeline.artifacts import Artifact
from gradmap_pipeline.run import step_run
from gradmap_pipeline.sweep.layerwise import LayerwiseModel

RANK = int(os.environ.get("RANK", "0"))
calls = None
run_layer, call_stage = LayerwiseModel.run_layer, step_run.call_stage

def act():
    with open("acted", "w") as file:
        file.write(str(time.monotonic()))
    ACT

def count_layer(self, *arguments, **named):
    global calls
    if calls is not None:
        calls += 1
        if calls == 3:
            act()
    return run_layer(self, *arguments, **named)

def call(step, *arguments):
    global calls
    if step.stage.name == "STAGE":
        if RANK == FAILING:
            calls = 0
        result = call_stage(step, *arguments)
        contents = {name: getattr(result, name).content() for name in type(result).model_fields if name != "work"}
        with open(f"result-{RANK}.json", "w") as file:
            json.dump(contents, file, sort_keys=True)
        return result
    return call_stage(step, *arguments)

LayerwiseModel.run_layer, step_run.call_stage = count_layer, call

@hookimpl
def gradmap_stages():
    return []
'''


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """A folder with the store of a run that has calibrated, for two models: the second has biases."""
    folder = tmp_path_factory.mktemp("prepared")
    for model in (llama, make_model(tmp_path_factory.mktemp("gpt2"), "gpt2")):
        (folder / "r.yaml").write_text(PREPARED.replace("MODEL", str(model)).replace("TEXT", str(text)))
        (done,) = run_ranks(folder, ["run", "r.yaml", "--quiet"], [{}])
        assert done.code == 0, done.stderr
    (folder / "gpt2").symlink_to(model)
    return folder


def write_run(
    folder: Path, stage: str, prepared: Path, llama: Path, text: Path, *, act: str = "pass", failing: int = 1
) -> list[str]:
    """A recipe with one stage, on what is prepared, and the plugin; returns the arguments."""
    shutil.copytree(prepared / ".gradmap", folder / ".gradmap")
    model = (prepared / "gpt2").resolve() if stage == "mean_bias" else llama
    name = stage.split(maxsplit=1)[0]
    steps = "" if stage in SCORES else "  - use: prune\n    with: {layers: [1, 2]}\n"
    steps += f"  - use: {name}\n    with: {STAGES[stage]}\n"
    (folder / "r.yaml").write_text((PREPARED + steps).replace("MODEL", str(model)).replace("TEXT", str(text)))
    plugin = PLUGIN.replace('"STAGE"', repr(name)).replace("FAILING", str(failing)).replace("ACT", act)
    (folder / "plugin.py").write_text(plugin)
    return ["run", "r.yaml", "--plugin", "plugin.py", "--json"]


def told(ends: list[Ended]) -> list[str]:
    """All messages with which the processes ended."""
    return [message for end in ends for message in end.errors]


def seconds_since_fault(folder: Path, ends: list[Ended]) -> float:
    """From what one process did to the end of the last."""
    return max(end.time for end in ends) - float((folder / "acted").read_text())


def results(folder: Path) -> list[str]:
    return [(folder / f"result-{rank}.json").read_text() for rank in range(2)]


@pytest.mark.parametrize("stage", cases(STAGES))
def test_two_processes_come_to_equal_bytes_and_to_the_decisions_of_one(
    stage: str, prepared: Path, tmp_path: Path, llama: Path, text: Path
) -> None:
    outputs = []
    for number, variables in enumerate(([{}], torchrun_variables())):
        folder = tmp_path / str(number)
        folder.mkdir()
        ends = run_ranks(folder, write_run(folder, stage, prepared, llama, text), variables)
        assert [end.code for end in ends] == [0] * len(ends), (told(ends), ends[-1].stderr[-2000:])
        outputs.append([event["outputs"] for event in ends[0].events if event["event"] == "step_finished"][-1])
    one, two = results(folder)
    assert one == two
    if stage in SCORES:
        decisions = [[made["removed"] for made in output["scores"]["decisions"]] for output in outputs]
        assert decisions[0] == decisions[1]
        for mine, other in zip(*(output["scores"]["decisions"] for output in outputs), strict=True):
            assert mine["scores"] == pytest.approx(other["scores"], rel=1e-4 if stage == "lookahead_score" else 1e-5)
    elif stage in CORRECTIONS:
        for mine, other in zip(*(output["compensation"]["sites"] for output in outputs), strict=True):
            assert (mine["layer"], mine["parameter"]) == (other["layer"], other["parameter"])
            assert mine["missing_left"] == pytest.approx(other["missing_left"], rel=1e-4)
    elif stage == "evaluate":
        assert outputs[0]["evaluation"]["loss"] == pytest.approx(outputs[1]["evaluation"]["loss"], rel=1e-6)
    elif stage == "refit_layers":  # each process takes samples of its own, in an order of its own
        for mine, other in zip(*(output["refit"]["layers"] for output in outputs), strict=True):
            assert (mine["layer"], mine["before"]) == (other["layer"], pytest.approx(other["before"], rel=1e-4))
            assert max(mine["after"], other["after"]) < mine["before"]
    else:
        mine, other = (output["distillation"] for output in outputs)
        assert mine["after"] == pytest.approx(other["after"], rel=1e-4)


FAULTS = {
    "error": ("raise StageError('only here')", 4, "only here (in process 1 of 2)"),
    "shortage": ("raise MemoryError('no room here')", 3, "ran out of memory: no room here"),
    "death": ("os.kill(os.getpid(), signal.SIGKILL)", 4, LOST.format(1)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", cases(STAGES))
def test_fault_of_one_process_ends_all_with_one_message(
    stage: str, fault: str, prepared: Path, tmp_path: Path, llama: Path, text: Path
) -> None:
    act, code, message = FAULTS[fault]
    ends = run_ranks(tmp_path, write_run(tmp_path, stage, prepared, llama, text, act=act))
    assert [end.code for end in ends] == [code, -9 if fault == "death" else code], told(ends)
    (said,) = told(ends)
    assert message in said
    assert ends[0].errors == [said]
    assert seconds_since_fault(tmp_path, ends) < 30
    assert not list((tmp_path / ".gradmap" / "steps").glob(f"{stage.split(maxsplit=1)[0]}-*"))


@pytest.mark.parametrize(
    ("act", "codes", "message"),
    [
        ("raise StageError('only here')", [4, 4], "only here"),
        ("os.kill(os.getpid(), signal.SIGKILL)", [-9, 4], LOST.format(0)),
    ],
)
def test_fault_of_the_leading_process_ends_all_with_one_message(
    act: str, codes: list[int], message: str, prepared: Path, tmp_path: Path, llama: Path, text: Path
) -> None:
    ends = run_ranks(tmp_path, write_run(tmp_path, "project_compensate", prepared, llama, text, act=act, failing=0))
    assert [end.code for end in ends] == codes
    (said,) = told(ends)
    assert said.endswith(message)
    assert seconds_since_fault(tmp_path, ends) < 30


@pytest.mark.parametrize(
    ("busy", "least"),
    [
        ("end = time.monotonic() + 100\n            while time.monotonic() < end: pass", 0),
        ("time.sleep(100)", 5),  # one call of the system: the message is told by another thread, after a while
    ],
    ids=["computes", "sleeps"],
)
def test_process_that_is_busy_is_ended(busy: str, least: float, prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    """It would not come to the next exchange for minutes, and ends all the same."""
    arguments = write_run(tmp_path, "gradmap_score", prepared, llama, text, act="os.kill(os.getpid(), signal.SIGKILL)")
    apart = f"""def call(step, *arguments):
    if step.stage.name == 'gradmap_score':
        if RANK == 0:
            {busy}
        time.sleep(1)
        act()
"""
    plugin = (tmp_path / "plugin.py").read_text()
    (tmp_path / "plugin.py").write_text(plugin.replace("def call(step, *arguments):\n", apart))
    ends = run_ranks(tmp_path, arguments)
    assert [end.code for end in ends] == [4, -9]
    assert [said.removeprefix("error: step 'gradmap_score': ") for said in told(ends)] == [LOST.format(1)]
    assert least < seconds_since_fault(tmp_path, ends) < 30


@pytest.mark.parametrize("stage", ["project_compensate", "replaceme_compensate", "linearpatch_compensate", "mean_bias"])
def test_site_that_one_process_refuses_is_left_by_all(stage: str, prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    """The gain is not the structure's in one process alone: no sum of the others counts its tokens for another layer."""
    arguments = write_run(tmp_path, stage, prepared, llama, text)
    refuse = """
from gradmap_pipeline.correction import streams as module
check_gain = module.check_gain
def refuse(model, index, hidden, arguments, site):
    if RANK == 1 and index == 0 and site.role == "output":
        raise NoSiteError("this map has no place here")
    check_gain(model, index, hidden, arguments, site)
module.check_gain = refuse
"""
    (tmp_path / "plugin.py").write_text((tmp_path / "plugin.py").read_text() + refuse)
    ends = run_ranks(tmp_path, arguments)
    if stage in ("replaceme_compensate", "linearpatch_compensate"):  # the only site
        assert [end.code for end in ends] == [4, 4]
        assert told(ends) == ["this map has no place here"]
    else:
        assert [end.code for end in ends] == [0, 0], told(ends)
        (finished,) = [
            event for event in ends[0].events if event["event"] == "step_finished" and "compensation" in event["outputs"]
        ]
        sites = {(site["layer"], site["role"]) for site in finished["outputs"]["compensation"]["sites"]}
        assert (0, "output") not in sites
        assert {layer for layer, _ in sites} == {3}
        one, two = results(tmp_path)
        assert one == two


def test_capacity_that_one_process_lacks_is_lacked_by_all(prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    arguments = write_run(tmp_path, "project_compensate", prepared, llama, text)
    short = """
from gradmap_pipeline.correction import ridge
resident_bytes = ridge.resident_bytes
ridge.resident_bytes = lambda device: resident_bytes(device) + (1 << 50 if RANK == 1 else 0)
"""
    (tmp_path / "plugin.py").write_text((tmp_path / "plugin.py").read_text() + short)
    ends = run_ranks(tmp_path, arguments)
    assert [end.code for end in ends] == [3, 3]
    (said,) = told(ends)
    assert "correcting 64 inputs takes" in said


def test_processes_with_different_memory_plan_alike(prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    """One process has no room for layers that stay: neither keeps them."""
    arguments = write_run(tmp_path, "gradmap_score", prepared, llama, text)
    note = """
from gradmap_pipeline.sweep import sweep as module
plan_sweep, resident_bytes = module.plan_sweep, module.resident_bytes
def noted(needs, free, **named):
    plan = plan_sweep(needs, free, **named)
    with open(f"plan-{RANK}.json", "a") as file:
        print(free, plan, file=file)
    return plan
module.plan_sweep = noted
module.resident_bytes = lambda device: resident_bytes(device) + (1 << 30 if RANK == 1 else 0)
"""
    (tmp_path / "plugin.py").write_text((tmp_path / "plugin.py").read_text() + note)
    ends = run_ranks(tmp_path, [*arguments, "--memory", "3GiB"])
    assert [end.code for end in ends] == [0, 0], told(ends)
    one, two = ((tmp_path / f"plan-{rank}.json").read_text() for rank in range(2))
    assert one == two
    assert int(one.split()[0]) < 2 << 30


def test_different_commands_are_told(prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    arguments = write_run(tmp_path, "gradmap_score", prepared, llama, text)
    plugin = "\nfrom gradmap_plugins.gradmap_score import GradmapScore\n"
    plugin += (
        "if RANK == 1:\n    GradmapScore.model_fields['sample_share'].default = 0.75\n    GradmapScore.model_rebuild(force=True)\n"
    )
    (tmp_path / "plugin.py").write_text((tmp_path / "plugin.py").read_text() + plugin)
    ends = run_ranks(tmp_path, arguments)
    assert [end.code for end in ends] == [4, 4]
    (said,) = told(ends)
    assert said.startswith("the processes of this run have different recipes; start all with the same command, on the same files")


def test_text_that_differs_in_one_process_is_told(prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    arguments = write_run(tmp_path, "evaluate", prepared, llama, text)
    other = """
from gradmap_plugins import evaluate
make_sequences = evaluate.make_sequences
def changed(*arguments, **named):
    ids, mask = make_sequences(*arguments, **named)
    if RANK == 1:
        ids[0, 0] = 7
    return ids, mask
evaluate.make_sequences = changed
"""
    (tmp_path / "plugin.py").write_text((tmp_path / "plugin.py").read_text() + other)
    ends = run_ranks(tmp_path, arguments)
    assert [end.code for end in ends] == [4, 4]
    (said,) = told(ends)
    assert said.startswith("the processes of this run have different inputs of step 'evaluate'; start all with the same command")


def test_store_that_one_process_does_not_share_is_told(prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    arguments = write_run(tmp_path, "gradmap_score", prepared, llama, text)
    other = "\nfrom pathlib import Path\nfrom gradmap_pipeline.cli import command_options\n"
    other += "from gradmap_pipeline.run.store import Store\nload = Store.load\n"
    other += (
        "Store.load = lambda self, stage, *rest: None if RANK == 1 and stage == 'gradmap_score' else load(self, stage, *rest)\n"
    )
    (tmp_path / "plugin.py").write_text((tmp_path / "plugin.py").read_text() + other)
    ends = run_ranks(tmp_path, arguments)
    assert [end.code for end in ends] == [4, 4]
    (said,) = told(ends)
    assert "the result of step 'gradmap_score' is not in" in said
    assert "all processes must share that folder (in process 1 of 2)" in said


def test_recipe_that_is_wrong_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\nmodel: {path: nowhere}\nsteps:\n  - use: calibrat\n")
    ends = run_ranks(tmp_path, ["run", "r.yaml"])
    assert [end.code for end in ends] == [2, 2]
    assert sum("calibrat" in message for message in told(ends)) == 1


def test_interruption_of_one_process_ends_all(prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    act = "signal.raise_signal(signal.SIGTERM)"
    ends = run_ranks(tmp_path, write_run(tmp_path, "perplexity_score", prepared, llama, text, act=act))
    assert [end.code for end in ends] == [130, 130]
    assert any("interrupted; what is finished is kept" in message for message in ends[0].errors)


def test_stage_in_another_python_runs_in_one_process(prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    arguments = write_run(tmp_path, "shortgpt_score", prepared, llama, text)
    recipe = (tmp_path / "r.yaml").read_text() + f"    run: {{python: {sys.executable}}}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    ends = run_ranks(tmp_path, arguments)
    assert [end.code for end in ends] == [0, 0], told(ends)
    assert (tmp_path / "result-0.json").is_file()
    assert not (tmp_path / "result-1.json").exists()
    (finished,) = [event for event in ends[0].events if event["event"] == "step_finished" and event["step"] == "shortgpt_score"]
    assert len(finished["outputs"]["scores"]["decisions"]) == 2


@pytest.mark.parametrize("stage", ["sleb_score", "perplexity_score"])
def test_layers_are_shared_where_that_reads_less(stage: str, prepared: Path, tmp_path: Path, llama: Path, text: Path) -> None:
    """Where layers do not stay in memory each process scores half of them, by all samples; else all of them, by its samples."""
    scores, scored = [], []
    for number, (stays, variables) in enumerate([(True, [{}]), (True, torchrun_variables()), (False, torchrun_variables())]):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = write_run(folder, stage, prepared, llama, text)
        note = f"""
import dataclasses
from gradmap_pipeline.sweep import sweep as module
from gradmap_pipeline.sweep.sample_pass import SamplePass
plan_sweep, loss_without = module.plan_sweep, SamplePass.loss_without
module.plan_sweep = lambda *rest, **named: dataclasses.replace(plan_sweep(*rest, **named), is_resident={stays})
def noted(self, layer, **named):
    with open(f"scored-{{RANK}}", "a") as file:
        print(layer, sum(len(batch.input_ids) for batch in self.batches), file=file)
    return loss_without(self, layer, **named)
SamplePass.loss_without = noted
"""
        (folder / "plugin.py").write_text((folder / "plugin.py").read_text() + note)
        ends = run_ranks(folder, arguments, variables)
        assert [end.code for end in ends] == [0] * len(ends), told(ends)
        outputs = [event["outputs"] for event in ends[0].events if event["event"] == "step_finished"][-1]
        scores.append(outputs["scores"]["decisions"][0]["scores"])
        scored.append([(folder / f"scored-{rank}").read_text().splitlines() for rank in range(len(variables))])
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
    assert scores[2] == pytest.approx(scores[0], rel=1e-6)
    layers = [0, 1, 2, 3] if stage == "perplexity_score" else [1, 2]
    first = [[line.split() for line in lines[: len(layers)]] for lines in scored[1]]
    assert [[int(layer) for layer, _ in lines] for lines in first] == [layers, layers]
    assert [{int(samples) for _, samples in lines} for lines in first] == [{9}, {8}]
    half = [[line.split() for line in lines[: len(layers) // 2]] for lines in scored[2]]
    assert sorted(int(layer) for lines in half for layer, _ in lines) == layers
    assert {int(samples) for lines in half for _, samples in lines} == {17}


def test_processes_that_have_gone_different_ways_say_so(tmp_path: Path) -> None:
    """What is summed has the same shape, and is not of the same layer."""
    script = tmp_path / "apart.py"
    script.write_text("""
import torch
from gradmap_pipeline.errors import StageError
from gradmap_pipeline.machine.distributed import open_group
try:
    with open_group("cpu") as group, group.at(f"layer {group.rank}"):
        group.sum(torch.ones(2))
except StageError as error:
    print("told:", error, flush=True)
""")
    variables = torchrun_variables()
    command = [sys.executable, str(script)]
    started = [
        subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for own in variables
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert all("told: the processes of this run have gone different ways: one is at 'layer" in text for text in said), said
