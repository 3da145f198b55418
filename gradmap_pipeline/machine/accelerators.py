"""Devices that are not the CPU, whatever torch calls them: they have memory, streams and a module of torch of their own."""

from __future__ import annotations

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
