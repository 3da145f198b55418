"""Device `standin` of torch: not the CPU, and no hardware. It computes what the CPU computes, and refuses what a GPU refuses.

Two of them, `standin:0` and `standin:1`. Importing this builds the device (a minute, once) and registers it for the whole process,
so tests on it run in a process of their own.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(__file__).parent
SOURCES = ("device.cpp", "order.h")
NAME = "standin"
MEMORY = 1 << 34
"""Bytes that each has, as it says of itself."""


def build() -> Any:
    """The extension, built where nobody has built it from these sources and this torch."""
    from torch.utils import cpp_extension

    text = "".join((FOLDER / name).read_text() for name in SOURCES) + torch.__version__ + sys.version
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"gradmap-standin-{key}"
    folder.mkdir(exist_ok=True)
    return cpp_extension.load(
        f"standin_{key}", [str(FOLDER / "device.cpp")], extra_cflags=["-O1", "-w"], build_directory=str(folder), with_cuda=False
    )


def make_module(native: Any) -> ModuleType:
    """What `torch.cuda` is for a GPU, as far as the project calls it."""
    module = ModuleType(f"torch.{NAME}")

    def number(device: Any = None) -> int:
        index = None if device is None else device if isinstance(device, int) else torch.device(device).index
        return native.device() if index is None else index

    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": native.device,
        "set_device": lambda device: native.set_device(number(device)),
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "memory_allocated": lambda device=None: native.held(number(device)),
        "memory_reserved": lambda device=None: native.held(number(device)),
        "max_memory_allocated": lambda device=None: native.most(number(device)),
        "max_memory_reserved": lambda device=None: native.most(number(device)),
        "reset_peak_memory_stats": lambda device=None: native.forget_most(number(device)),
        "mem_get_info": lambda device=None: (MEMORY - native.held(number(device)), MEMORY),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: torch.accelerator.synchronize(torch.device(NAME, number(device))),
        "current_stream": lambda device=None: torch.accelerator.current_stream(torch.device(NAME, number(device))),
        "stream": lambda stream: stream,
        "Stream": lambda device=None: torch.Stream(torch.device(NAME, number(device))),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


torch.utils.rename_privateuse1_backend(NAME)
native = build()
torch._register_device_module(NAME, make_module(native))
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
