"""How much memory this process has, and how much it may have."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

DEFAULT_SHARE = 0.8
"""Of the memory that is free when a run starts."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_M_MMAP_THRESHOLD = -3  # malloc.h
_CGROUP = Path("/sys/fs/cgroup")


def parse_size(text: str) -> int:
    """Bytes in `3GiB`, `512M`, `2.5 GB` (10⁹) or a plain number. Raises `ValueError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"found {text!r}, accepted: a size such as 3GiB, 512MiB or 2.5GB")
    unit = _UNITS[match[2].upper()]
    decimal = (match[3] or "").upper() == "B" and unit > 1
    return int(float(match[1]) * (1000 ** (unit.bit_length() // 10) if decimal else unit))


def resident_bytes() -> int:
    """What this process has in memory now: its own pages and those mapped from files."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def keep_to_budget() -> None:
    """Have the C library take large blocks from the system and return them at once, instead of keeping them for later."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 16 << 20)


def give_back(*, between_steps: bool = False) -> None:
    """Return memory that is no longer used to the system.

    `between_steps`: what is still alive is libraries, which need not be looked through again.
    """
    gc.collect()
    if between_steps:
        gc.freeze()
    with suppress(OSError, AttributeError):  # another C library keeps or returns memory as it likes
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def default_budget() -> int:
    """80 % of what the machine, or the control group this process runs in, has free, and what the process has already."""
    import psutil

    free = min([int(psutil.virtual_memory().available), *_free_in_control_groups()])
    return int(DEFAULT_SHARE * free) + resident_bytes()


def _free_in_control_groups() -> list[int]:
    """What the control group of this process and those around it have left, where they have a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = _CGROUP / next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    groups = [own, *(group for group in own.parents if group.is_relative_to(_CGROUP))]
    found = [(_read_number(group / "memory.max"), _read_number(group / "memory.current")) for group in groups]
    return [max(0, limit - used) for limit, used in found if limit is not None and used is not None]


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return None
