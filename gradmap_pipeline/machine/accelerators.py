"""Devices that are not the CPU, whatever torch calls them: they have memory, streams and a module of torch of their own."""

from __future__ import annotations

import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any


def is_accelerator(device: str) -> bool:
    """Whether a device, as torch names it (`cpu`, `cuda:0`), has memory of its own."""
    return device.partition(":")[0] != "cpu"


def wait_for(device: str) -> None:
    """Until an accelerator has done all that it was given to do: for times. The CPU has."""
    if is_accelerator(device):
        module_of(device).synchronize(device)


def module_of(device: str) -> Any:
    """The part of torch for an accelerator: `torch.cuda` for `cuda:0`."""
    import torch

    return torch.get_device_module(torch.device(device))


@lru_cache(maxsize=8)
def name_device(device: str) -> str:
    """The product behind a device, as `Intel(R) Xeon(R) CPU @ 2.20GHz` or `NVIDIA H100`; else the processor's architecture."""
    if is_accelerator(device):
        get_name = getattr(module_of(device), "get_device_name", None)
        return str(get_name(device)) if get_name is not None else device
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()
