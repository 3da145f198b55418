"""The surroundings of a trainer: random numbers of its own, loggers that are quiet, and the processes that train together."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..machine.distributed import ProcessGroup

_OF_LAUNCHERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "PMI_", "OMPI_", "MV2_",
)  # fmt: skip
"""The beginnings of the names of variables by which accelerate takes a process for one of several."""


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Random numbers start from a seed, and their states are afterwards what they were."""
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextmanager
def seen_processes(group: ProcessGroup, device: str) -> Iterator[None]:
    """Have accelerate see meanwhile that the processes of `group` train together, whatever launcher started them.

    A group of one trains alone, even if others wait for it.
    """
    import torch
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_OF_LAUNCHERS)}
    threads = os.environ.get("OMP_NUM_THREADS")
    if group.size > 1:
        number = group.local_rank if device == "cpu" else group.gpu  # accelerate takes the GPU of this number
        places = {"RANK": group.rank, "LOCAL_RANK": number, "WORLD_SIZE": group.size, "LOCAL_WORLD_SIZE": group.size}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # else it sets a number of its own
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # who comes next looks for itself
        for name in [name for name in os.environ if name.startswith((*_OF_LAUNCHERS, "OMP_NUM_THREADS"))]:
            del os.environ[name]
        os.environ.update(kept if threads is None else {**kept, "OMP_NUM_THREADS": threads})


@contextmanager
def quiet() -> Iterator[None]:
    """The trainer's own log says nothing meanwhile, and no thread watches bars that nobody sees."""
    import tqdm  # type: ignore[import-untyped]

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    levels = [logger.level for logger in loggers]
    interval, tqdm.tqdm.monitor_interval = tqdm.tqdm.monitor_interval, 0
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tqdm.tqdm.monitor_interval = interval
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
