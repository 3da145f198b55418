"""How much memory this process has, and how much it may have: of the machine, or of a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from .accelerators import is_accelerator, module_of

DEFAULT_SHARE = 0.8
"""Share of the memory that is free when a run starts."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_CGROUP = Path("/sys/fs/cgroup")
_MOST = 2**60
"""The largest size that is accepted."""


class _Allocator:
    """The setting that the C library was given last."""

    is_tight = False
    """Blocks go back to the system as soon as they are free, if this is true."""


def parse_size(text: str) -> int:
    """Bytes in `3GiB`, `512M`, `2.5 GB` (10⁹) or a plain number. Raises `ValueError`."""
    accepted = f"found {text[:40]!r}, accepted: a size such as 3GiB, 512MiB or 2.5GB"
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([KMGT]?)(i?B)?\s*", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(accepted)
    unit = _UNITS[match[2].upper()]
    is_decimal = (match[3] or "").upper() == "B" and unit > 1
    size = int(float(match[1]) * (1000 ** (unit.bit_length() // 10) if is_decimal else unit))
    if size > _MOST:
        raise ValueError(f"{accepted}, up to {_MOST >> 40}TiB")
    return size


def resident_bytes(device: str = "cpu") -> int:
    """What this process has in memory now: its own pages and those mapped from files. On a GPU: what torch holds there."""
    if is_accelerator(device):
        return int(module_of(device).memory_reserved(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: str = "cpu") -> int | None:
    """The most that this process has had in memory so far; on a GPU, the most that torch has held there. None: not known."""
    if is_accelerator(device):
        return int(module_of(device).max_memory_reserved(device))
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prefer_huge_pages() -> None:
    """Have torch request large pages, which the system hands out faster. This takes effect before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def tune_allocator(*, is_tight: bool) -> None:
    """Have the C library return blocks to the system as soon as they are free, or, unless memory `is_tight`, keep them.

    To get a block again costs more than many a computation on it. But kept blocks of many sizes leave gaps between them that
    nothing fits into: a tenth of what a sweep with hidden states of a few MiB takes.
    """
    _Allocator.is_tight = is_tight
    if is_tight:
        _set_thresholds(1 << 20, 128 << 10)
    else:
        _set_thresholds(32 << 20, 2**31 - 1)


def keep_blocks(*, keep: bool = True) -> None:
    """Where memory is tight, keep freed blocks of some MiB from now on all the same, or not; until the step ends at most.

    To be called where a step takes so much less than it may that gaps between them do no harm.
    """
    if _Allocator.is_tight:
        _set_thresholds(*((16 << 20, 64 << 20) if keep else (1 << 20, 128 << 10)))


def _set_thresholds(mapped: int, trimmed: int) -> None:
    """Bytes of a block that comes from the system alone, and of what is free at the end of all others before it goes back."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, mapped)
        libc.mallopt(_M_TRIM_THRESHOLD, trimmed)


def give_back(*, between_steps: bool = False) -> None:
    """Return memory that is no longer used to the system.

    `between_steps`: what is still alive is libraries, which need not be looked through again.
    """
    gc.collect()
    if between_steps:
        gc.freeze()
        keep_blocks(keep=False)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()
        getattr(sys.modules["torch"]._C, "_host_emptyCache", lambda: None)()  # pinned memory; builds for the CPU have none
    with suppress(OSError, AttributeError):  # another C library keeps or returns memory as it likes
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_on_host(device: str, host_memory: int) -> int:
    """What is left of the bytes that this process may have resident in the machine beside a GPU; none where there is no GPU."""
    return max(0, host_memory - resident_bytes()) if is_accelerator(device) else 0


def default_budget(device: str = "cpu") -> int:
    """80 % of what is free, and what the process has already."""
    return int(DEFAULT_SHARE * free_bytes(device)) + resident_bytes(device)


def free_bytes(device: str = "cpu") -> int:
    """What the machine, or the control group this process runs in, has free; files are kept there after reading, as far as it goes.

    On a GPU: what the GPU has free.
    """
    if is_accelerator(device):
        return int(module_of(device).mem_get_info(device)[0])
    import psutil

    return min([int(psutil.virtual_memory().available), *_free_in_control_groups(), *_free_in_address_space()])


def _free_in_address_space() -> list[int]:
    """What the limit on this process's address space (`ulimit -v`) leaves, where there is one."""
    if sys.platform == "win32":
        return []
    import resource

    import psutil

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if limit == resource.RLIM_INFINITY else [max(0, limit - int(psutil.Process().memory_info().vms))]


def _free_in_control_groups() -> list[int]:
    """What the control group of this process and those around it have left, where they have a limit."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    free = []
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
                free.append(max(0, most - max(0, now - _read_cache(group))))
    return free


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
