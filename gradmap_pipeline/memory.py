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
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, place in lines:
        if not controllers:  # version 2
            root, limit, used = _CGROUP, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = _CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / place.lstrip("/")
        for group in (own, *(above for above in own.parents if above.is_relative_to(root))):
            most, now = _read_number(group / limit), _read_number(group / used)
            if most is not None and now is not None:
                found.append(max(0, most - max(0, now - _read_cache(group))))
    return found


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return None


def _read_cache(group: Path) -> int:
    """Bytes of files that a control group holds and the kernel takes back when it needs room."""
    try:
        entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
