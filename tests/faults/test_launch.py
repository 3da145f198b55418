"""Processes that a launcher starts: what it tells them, and what is said when some do not come or have no device of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port, run_ranks, torchrun_variables

from gradmap_pipeline.errors import LaunchError
from gradmap_pipeline.machine.joining import check_places
from gradmap_pipeline.machine.launch import Place, is_leading, is_one_of_many, read_place

TWO = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
STEP = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "the environment variable WORLD_SIZE is 'x', accepted: 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT not set; start the processes",
        ),
        ({**TWO, "RANK": ""}, "RANK is ''"),
        ({"RANK": "1"}, "RANK is '1', accepted: 0 to 0"),
        ({**TWO, "RANK": "2"}, "RANK is '2', accepted: 0 to 1"),
        ({**TWO, "MASTER_PORT": "x"}, "MASTER_PORT is 'x', accepted: 0 to 65535"),
        ({**TWO, "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({**STEP, "SLURM_PROCID": "8"}, "SLURM_PROCID is '8', accepted: 0 to 7"),
        ({**STEP, "SLURM_JOB_ID": ""}, "SLURM_STEP_NUM_TASKS is 8, but MASTER_PORT not set"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NUM_TASKS is 8, but MASTER_ADDR not set"),
    ],
)
def test_odd_variables_of_launchers(variables: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match="environment variable") as refusal:
        read_place(variables)
    assert message in str(refusal.value)
    assert refusal.value.exit_code == 4


def test_variables_of_torchrun() -> None:
    assert read_place({}) == Place()
    assert read_place({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) == Place()
    four = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert read_place(four) == Place(3, 4, 1, "host", 29500)
    assert is_one_of_many(four)
    assert not is_leading(four)
    assert is_leading({**four, "RANK": "0"})
    assert is_leading({})


@pytest.mark.parametrize(
    ("changes", "address", "port"),
    [
        ({}, "gpu03", 20000 + 1234 * 61 % 12000),
        ({"SLURM_STEP_NODELIST": "gpu7,gpu[1-2]"}, "gpu7", None),
        ({"SLURM_STEP_NODELIST": "rack[2,4]-node[08-11,20]"}, "rack2-node08", None),
        ({"SLURM_STEP_NUM_NODES": "1"}, "127.0.0.1", None),
        ({"SLURM_STEP_RESV_PORTS": "12001-12002"}, "gpu03", 12001),
        ({"SLURM_STEP_RESV_PORTS": "12001,12005"}, "gpu03", 12001),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}, "10.0.0.1", 4000),
    ],
)
def test_variables_of_srun(changes: dict[str, str], address: str, port: int | None) -> None:
    place = read_place({**STEP, **changes})
    assert (place.rank, place.size, place.local_rank, place.address) == (5, 8, 1, address)
    assert place.port == port or port is None
    assert not is_leading({**STEP, **changes})


def test_steps_of_one_job_do_not_meet_at_one_port() -> None:
    ports = {read_place({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port for job in (7, 8) for step in range(9)}
    assert len(ports) == 18
    assert all(20000 <= port < 32000 for port in ports)


def test_batch_script_is_one_process() -> None:
    """Slurm sets rank and number of tasks in the script, too, and no step."""
    script = {name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert read_place(script) == Place()
    assert is_leading(script)


def test_torchrun_inside_a_step_counts() -> None:
    assert read_place({**STEP, **TWO, "LOCAL_RANK": "0"}) == Place(0, 2, 0, "a", 1)
    assert read_place({**STEP, "WORLD_SIZE": "1"}) == Place()


def test_every_process_has_a_gpu_of_its_own_or_none_has() -> None:
    check_places([{"host": "a", "gpu": None}, {"host": "a", "gpu": None}])
    check_places([{"host": "a", "gpu": "1"}, {"host": "a", "gpu": "2"}, {"host": "b", "gpu": "1"}])
    with pytest.raises(LaunchError, match="3 processes on a have 2 GPUs, and each needs one of its own; start no more processes"):
        check_places([{"host": "a", "gpu": "1"}, {"host": "a", "gpu": "2"}, {"host": "a", "gpu": "1"}])
    with pytest.raises(LaunchError, match="process 1 on b finds no GPU, process 0 on a has one; use --device cpu"):
        check_places([{"host": "a", "gpu": "1"}, {"host": "b", "gpu": None}])


FEW_GPUS = """
import sys, types
import torch
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(uuid=f"GPU-{number}")
sys.argv = ["gradmap", "run", "r.yaml"]
from gradmap_pipeline.cli import main
main()
"""


@pytest.mark.full
def test_fewer_gpus_than_processes_end_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(FEW_GPUS)
    started = [
        subprocess.Popen(
            [sys.executable, "few.py"],
            cwd=tmp_path,
            env={**os.environ, **own},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in torchrun_variables()
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [4, 4]
    (line,) = "".join(said).splitlines()
    assert "2 processes on " in line
    assert "have 1 GPU, and each needs one of its own; start no more processes on a machine than it has GPUs" in line


@pytest.mark.full
@pytest.mark.parametrize(
    ("rank", "seconds", "message"),
    [
        pytest.param(
            *(0, None, "error: process 1 of 2 has not come within 20 s; start all processes at once, see what each says"),
            marks=pytest.mark.slow,
        ),
        (1, "3", "error: process 0 of 2 has not come: nothing answers at 127.0.0.1:"),
    ],
)
def test_process_that_never_comes(rank: int, seconds: str | None, message: str, tmp_path: Path) -> None:
    """It is waited for 20 s, or as long as the environment says."""
    waiting = {} if seconds is None else {"GRADMAP_JOIN_SECONDS": seconds}
    (end,) = run_ranks(tmp_path, ["run", "r.yaml"], [{**torchrun_variables()[rank], **waiting}])
    assert end.code == 4
    (line,) = end.stderr.splitlines()
    assert line.startswith(message)
    assert end.seconds < 30


@pytest.mark.full
def test_some_of_three_never_come_and_all_who_did_end(tmp_path: Path) -> None:
    variables = [{**own, "GRADMAP_JOIN_SECONDS": "2"} for own in torchrun_variables(4)]
    ends = run_ranks(tmp_path, ["run", "r.yaml"], [variables[0], variables[2]])
    assert [end.code for end in ends] == [4, 4]
    assert ends[0].stderr.startswith("error: processes 1, 3 of 4 have not come within 2 s; start all processes at once")
    assert not ends[1].stderr
    assert max(end.seconds for end in ends) < 15


@pytest.mark.full
def test_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        variables = {**torchrun_variables()[0], "MASTER_PORT": str(taken.getsockname()[1])}
        (end,) = run_ranks(tmp_path, ["run", "r.yaml"], [variables])
    assert end.code == 4
    (line,) = end.stderr.splitlines()
    assert "the processes cannot meet at 127.0.0.1:" in line
    assert line.endswith("name a port that is free on the machine of process 0")


@pytest.mark.full
@pytest.mark.parametrize("text", ["0", "soon", "99999999999"])
def test_time_to_wait_that_is_none(text: str, tmp_path: Path) -> None:
    (end,) = run_ranks(tmp_path, ["run", "r.yaml"], [{**torchrun_variables()[0], "GRADMAP_JOIN_SECONDS": text}])
    assert end.code == 4
    assert end.errors == [f"error: the environment variable GRADMAP_JOIN_SECONDS is {text!r}, accepted: whole seconds, 1 to 86400"]


def srun_variables(size: int) -> list[dict[str, str]]:
    """What srun sets for each task of a step on one node."""
    common = {**STEP, "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu03"}
    common |= {"SLURM_STEP_RESV_PORTS": str(free_port())}
    return [{**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(size)]


@pytest.mark.full
def test_two_tasks_of_srun_run_one_recipe(tmp_path: Path, llama: Path, text: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n"
        f"  - use: evaluate\n    with: {{dataset: {{path: {text}}}, samples: 5, sequence_length: 16}}\n"
    )
    plugin = """
from gradmap_pipeline import hookimpl
from gradmap_plugins import evaluate
score_text = evaluate.score_text
def noted(model, ids, mask, context):
    open(f"share-{context.group.rank}", "w").write(f"{context.group.size} {len(context.group.share(ids))}")
    return score_text(model, ids, mask, context)
evaluate.score_text = noted
@hookimpl
def gradmap_stages():
    return []
"""
    (tmp_path / "p.py").write_text(plugin)
    ends = run_ranks(tmp_path, ["run", "r.yaml", "--plugin", "p.py", "--json"], srun_variables(2))
    assert [end.code for end in ends] == [0, 0], ends
    assert [(tmp_path / f"share-{rank}").read_text() for rank in range(2)] == ["2 3", "2 2"]
    assert ends[0].events[-1]["event"] == "run_finished"
    assert not ends[1].stdout
