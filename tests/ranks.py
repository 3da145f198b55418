"""Start the processes of one run as a launcher would, without a launcher: forked from a server that has imported torch once."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PRELOADED = [
    "torch", "torch.distributed", "torch._dynamo", "datasets", "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "gradmap_pipeline.cli.commands", "gradmap_pipeline.run.runner",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    code: int
    """Its exit code; negative: the signal that killed it."""
    stdout: str
    stderr: str
    seconds: float
    """From the start of all."""
    time: float
    """When, by the clock that `time.monotonic` reads in all processes."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it told as JSON."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]

    @property
    def errors(self) -> list[str]:
        """Messages with which it ended, told in either way."""
        told = [event["message"] for event in self.events if event["event"] == "error"]
        return told + [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun_variables(size: int = 2) -> list[dict[str, str]]:
    """What torchrun sets for each of its processes."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run_ranks(
    folder: Path, arguments: Sequence[str], variables: Sequence[Mapping[str, str]] | None = None, seconds: float = 120
) -> list[Ended]:
    """Run `gradmap` with these arguments in a process for each set of variables; two by default, as torchrun starts them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    variables = torchrun_variables() if variables is None else variables
    _warm_up(context)
    started = time.monotonic()
    processes = []
    for number, own in enumerate(variables):
        files = str(folder / f"stdout-{number}"), str(folder / f"stderr-{number}")
        process = context.Process(target=_run_rank, args=(str(folder), list(arguments), dict(own), *files))
        process.start()
        processes.append(process)
    ends: dict[int, float] = {}  # by the number of the process
    while len(ends) < len(processes) and time.monotonic() < started + seconds:
        for number, process in enumerate(processes):
            if number not in ends and process.exitcode is not None:
                ends[number] = time.monotonic()
        time.sleep(0.02)
    late = [number for number in range(len(processes)) if number not in ends]
    for number in late:
        processes[number].kill()
    told = []
    for number, process in enumerate(processes):
        process.join()
        out, err = ((folder / f"{name}-{number}").read_text() for name in ("stdout", "stderr"))
        assert process.exitcode is not None
        ended = ends.get(number, started + seconds)
        told.append(Ended(process.exitcode, out, err, ended - started, ended))
        process.close()
    assert not late, f"processes {late} did not end: {told}"
    return told


def _warm_up(context: Any) -> None:
    """Have the server import everything before the time counts."""
    process = context.Process(target=_ready)
    process.start()
    process.join()
    process.close()


def _ready() -> None:
    pass


def _run_rank(folder: str, arguments: list[str], variables: dict[str, str], out: str, err: str) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["gradmap", *arguments]
    from gradmap_pipeline.cli import main

    main()
