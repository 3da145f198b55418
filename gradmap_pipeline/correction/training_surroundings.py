"""What a trainer finds around it: random numbers of its own, loggers that are quiet, and no sign of a launcher."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

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
def alone() -> Iterator[None]:
    """Nothing says meanwhile that a launcher started several processes, of which this one trains while the others wait."""
    names = [name for name in os.environ if name.startswith(_OF_LAUNCHERS)]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


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
