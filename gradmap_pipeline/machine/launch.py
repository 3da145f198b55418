"""Which of the processes of a run this one is, as `torchrun`, `accelerate launch` and `srun` tell it in environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import LaunchError

_MOST = 1 << 20
_ADVICE = "start the processes with torchrun, accelerate launch or srun, or unset these variables for a run in one process"
_SLURM = {"WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
"""What `srun` calls the variables of `torchrun`. It alone sets those of a step: in a batch script, which is one process,
`SLURM_PROCID` and `SLURM_NTASKS` stand, too."""
_PORTS = range(20000, 32000)
"""Below those that systems hand out by themselves."""


@dataclass(frozen=True)
class Place:
    """One process among those of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    address: str = ""
    """Of the machine of the process with rank 0; empty where there is one process."""
    port: int = 0
    """On which that machine, or torchrun there, is to be reached."""


def read_place(variables: Mapping[str, str]) -> Place:
    """The place that a launcher gave this process. Raises `LaunchError` where its variables are odd, or some are missing."""
    names = _names(variables)

    def read(name: str, default: int, least: int, below: int) -> int:
        text = variables.get(names[name], str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) < below):
            accepted = f"{least} to {below - 1}" if below < _MOST else f"{least} or more"
            raise LaunchError(f"the environment variable {names[name]} is {text!r}, accepted: {accepted}; {_ADVICE}")
        return int(text)

    size = read("WORLD_SIZE", 1, 1, _MOST)
    rank, local_rank = read("RANK", 0, 0, size), read("LOCAL_RANK", 0, 0, size)
    if size == 1:
        return Place()
    variables = variables if names["RANK"] == "RANK" else {**_meeting_point(variables), **variables}
    missing = [names[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not variables.get(names[name])]
    if missing:
        raise LaunchError(
            f"the environment variable {names['WORLD_SIZE']} is {size}, but {' and '.join(missing)} not set; {_ADVICE}"
        )
    return Place(rank, size, local_rank, variables["MASTER_ADDR"], read("MASTER_PORT", 0, 0, 65536))


def is_one_of_many(variables: Mapping[str, str]) -> bool:
    """Whether a launcher says that there are other processes. Never raises."""
    return variables.get(_names(variables)["WORLD_SIZE"], "1") not in ("", "1")


def is_leading(variables: Mapping[str, str]) -> bool:
    """Whether this is the process that writes and reports. Never raises."""
    return not is_one_of_many(variables) or variables.get(_names(variables)["RANK"], "0") == "0"


def _names(variables: Mapping[str, str]) -> dict[str, str]:
    """The names of the variables that count, by those of `torchrun`: its own where one of them stands."""
    own = {name: name for name in (*_SLURM, "MASTER_ADDR", "MASTER_PORT")}
    is_step = "WORLD_SIZE" not in variables and "RANK" not in variables and _SLURM["WORLD_SIZE"] in variables
    return {**own, **_SLURM} if is_step else own


def _meeting_point(variables: Mapping[str, str]) -> dict[str, str]:
    """Address and port for the tasks of one `srun`, which all come to by themselves: on the first node of the step.

    The port is one that Slurm has reserved (`--resv-ports`), else it follows from the numbers of job and step.
    """
    is_one_node = variables.get("SLURM_STEP_NUM_NODES") == "1"
    address = "127.0.0.1" if is_one_node else _first_node(variables.get("SLURM_STEP_NODELIST", ""))
    reserved = re.match(r"[0-9]+", variables.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return {"MASTER_ADDR": address, "MASTER_PORT": reserved[0]}
    numbers = [variables.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
        return {"MASTER_ADDR": address}
    job, step = map(int, numbers)
    return {"MASTER_ADDR": address, "MASTER_PORT": str(_PORTS[(job * 61 + step) % len(_PORTS)])}


def _first_node(nodes: str) -> str:
    """The first of nodes as Slurm writes them: `gpu[03-04,07],login1` is gpu03."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])*", nodes)
    return re.sub(r"\[([0-9]*)[^\]]*\]", r"\1", first[0]) if first else ""
