"""The bytes of tensors to and from unbuffered files.

Files are read and written, not mapped: the kernel counts mapped pages as this process's memory until it takes them back.
"""

from __future__ import annotations

from io import RawIOBase
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to read or to write."""
    import torch

    return memoryview(cast("Any", tensor.view(-1).view(torch.uint8).numpy())).cast("B")


def read_into(file: RawIOBase, offset: int, tensor: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor from a file. Raises `EOFError` where the file ends early."""
    data = bytes_of(tensor)
    file.seek(offset)
    while data:
        count = file.readinto(data)
        if not count:
            raise EOFError
        data = data[count:]


def write_from(file: RawIOBase, offset: int, tensor: torch.Tensor) -> None:
    """Write the bytes of a contiguous CPU tensor into a file."""
    data = bytes_of(tensor)
    file.seek(offset)
    while data:
        data = data[file.write(data) :]
