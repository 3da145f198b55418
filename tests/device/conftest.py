"""Tests on a device that is not the CPU, the one that GRADMAP_TEST_DEVICE names.

`tests/test_devices.py` runs them in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

DEVICE = os.environ.get("GRADMAP_TEST_DEVICE", "standin:0")


@pytest.fixture(scope="session")
def device() -> str:
    """As torch names it."""
    if DEVICE.startswith("standin"):
        import standin  # noqa: F401 - registers the device
    return DEVICE


@pytest.fixture
def faults(device: str) -> Iterator[None]:
    """Memory of the stand-in device must not be freed while another stream may use it."""
    if device.startswith("standin"):
        import standin

        standin.native.take_faults()
        yield
        assert standin.native.take_faults() == []
    else:
        yield
