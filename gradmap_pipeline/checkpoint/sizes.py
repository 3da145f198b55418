"""The numbers in a config against the tensors of its checkpoint, before anything is made from them.

Classes of transformers make lists, maps and modules as long as a config says. A number that no tensor confirms could take any
amount of memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .depth import count_layers
from .files import check_pointer, find_shards
from .infinities import find_infinite

if TYPE_CHECKING:
    from .checkpoint import StoredTensor

_LARGEST = 1 << 20
"""Numbers up to this need no tensor: a list of so many entries is made in a moment."""
_FREE = ("position", "theta", "length", "base", "seq", "context", "window", "token", "ctx", "seed", "pixels", "chunk")
"""Parts of the names of numbers that nothing is made from by its size."""
_UNBOUNDED = "limit"
"""Part of the names of numbers that may be infinite: no limit."""
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
_SLACK = 1 << 28  # bytes of buffers that any model may have: a causal mask of GPT-2's time


@dataclass(frozen=True)
class Room:
    """What a model without weights may have at most, by the tensors of its checkpoint."""

    parameters: int
    elements: int
    """Elements of all parameters."""
    buffer_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor]) -> Room:
        """Tied weights are stored once, and several tensors of one may be stored as one."""
        elements = sum(tensor.elements for tensor in tensors.values())
        return cls(4 * len(tensors) + 1000, 2 * elements + (1 << 20), 16 * elements + _SLACK)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the headers of a folder's shards, as far as they can be read; no header is checked here.

    Raises `ModelError` where a file has none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in find_shards(folder):
        for name, entry in _read_raw_header(file).items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            is_shape = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
            shapes[name] = tuple(shape) if is_shape and isinstance(shape, list) else ()
    shapes.pop("__metadata__", None)
    return shapes


def _read_raw_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            check_pointer(file, start + stream.read(64))
            stream.seek(8)
            length = int.from_bytes(start, "little")
            if not 0 < length <= min(file.stat().st_size - 8, _HEADER_LIMIT):
                raise ValueError("its header is longer than the file" if length <= _HEADER_LIMIT else "its header is too large")
            header = json.loads(stream.read(length), object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
    except RecursionError as error:
        raise ModelError(f"{str(file)!r} is not a complete safetensors file: its header is nested too deeply") from error
    except OSError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{str(file)!r} is not a complete safetensors file: {error}; download it again") from error
    return header


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header names {repeated!r} twice")
    return content


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise `ModelError` where config.json has a number that the tensors' names and shapes do not confirm."""
    where = str(folder / "config.json")
    layers = count_layers(_text_of(config))
    if layers is not None and layers > len(shapes):
        raise ModelError(f"{where!r} says {layers:,} layers, but the checkpoint has {len(shapes)} tensors")
    most = max((size for shape in shapes.values() for size in shape), default=0)
    for field, value in find_infinite(config):
        if math.isnan(value) or _UNBOUNDED not in field.rpartition(".")[2].lower():
            raise ModelError(f"{where!r} has {'NaN' if math.isnan(value) else value} as {field!r}; accepted: a finite number")
    for field, number in _numbers(config, ""):
        name = field.rpartition(".")[2].lower()
        if abs(number) > max(most, _LARGEST) and not any(part in name for part in _FREE):
            raise ModelError(f"{where!r} has {number:,} as {field!r}, but no size in the checkpoint is over {most:,}")
        if abs(number) >= 1 << 62:
            raise ModelError(f"{where!r} has {number:,} as {field!r}, which is too large for any computer")


def _text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else dict(config)


def _numbers(content: object, field: str) -> Iterator[tuple[str, int]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _numbers(value, f"{field}.{name}" if field else str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, field)
    elif isinstance(content, int) and not isinstance(content, bool):
        yield field, content
