"""Safetensors checkpoints: read headers, bring in tensors, write shards without holding them in memory.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..artifacts import ExportedFile
from ..errors import ModelError
from .casts import FOR_COMPUTING, FOR_WRITING, cast, cast_all, overflow
from .files import INDEX, check_pointer, find_shards, read_weight_map
from .raw import read_into

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOAT_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TORCH_NAMES = {**_FLOAT_NAMES, "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_FLOATS = {torch_name: name for name, torch_name in _FLOAT_NAMES.items()}
_CHUNK = 8 << 20  # bytes copied at a time; a multiple of every item size
MAX_SHARD_BYTES = 5_000_000_000


def item_bytes(dtype: str) -> int:
    """Bytes of a number of a floating-point type, by the name that torch gives it."""
    return ITEM_BYTES[_FLOATS[dtype]]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk."""

    file: Path
    name: str
    dtype: str
    """The type as safetensors writes it: `BF16`."""
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype in _FLOAT_NAMES

    @property
    def torch_dtype(self) -> str:
        """The floating-point type by torch's name."""
        return _FLOAT_NAMES[self.dtype]

    def dtype_as(self, torch_dtype: str | None) -> str:
        """The stored type after a cast of floating-point tensors to `torch_dtype` (None: no cast)."""
        return _FLOATS[torch_dtype] if torch_dtype is not None and self.dtype in _FLOAT_NAMES else self.dtype

    def size_as(self, torch_dtype: str | None) -> int:
        """Bytes after that cast."""
        return self.elements * ITEM_BYTES[self.dtype_as(torch_dtype)]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, without reading them. The safetensors library says whether the file is one."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as stream:
            start = stream.read(72)
        check_pointer(file, start)
        with safe_open(file, framework="np") as opened:  # mapped, and of the map only the header is looked at
            shapes = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            entries = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in shapes]
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        if reason.startswith("incomplete metadata"):
            reason = f"it has {file.stat().st_size} bytes, which is not what its header says"
        raise ModelError(f"{str(file)!r} is not a complete safetensors file: {reason}; download it again") from error
    except OSError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    tensors: dict[str, StoredTensor] = {}
    end = 8 + int.from_bytes(start[:8], "little")
    for name, dtype, shape in entries:  # in the order of their data, which has no gaps
        if dtype not in ITEM_BYTES:
            raise ModelError(f"{str(file)!r} holds {name!r} of type {dtype}; prune a checkpoint that is not quantised")
        tensors[name] = StoredTensor(file, name, dtype, shape, end)
        end += tensors[name].size
    return tensors


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of a checkpoint folder by name, from the headers of its shards."""
    tensors: dict[str, StoredTensor] = {}
    shards = find_shards(folder)
    for file in shards:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ModelError(f"{str(folder)!r} holds {name!r} twice, in {tensors[name].file.name!r} and {file.name!r}")
            tensors[name] = tensor
    if (folder / INDEX).is_file() and shards != [folder / "model.safetensors"]:
        for name, shard in read_weight_map(folder).items():
            if name not in tensors or tensors[name].file != folder / shard:
                raise ModelError(f"{str(folder)!r} lacks {name!r}, which its index says is in {shard!r}; download it again")
    return tensors


def load_tensor(
    stored: StoredTensor, torch_dtype: torch.dtype | None = None, *, pinned: bool = False, remedy: str = FOR_COMPUTING
) -> torch.Tensor:
    """Read one tensor, casting floating-point values to `torch_dtype` a chunk at a time.

    `pinned`: into memory from which a GPU copies by itself. Raises `StageError` where a finite value would become infinite;
    `remedy`: what to do then.
    """
    import torch

    source: torch.dtype = getattr(torch, _TORCH_NAMES[stored.dtype])
    target = torch_dtype if torch_dtype is not None and source.is_floating_point else source
    values = torch.empty(stored.elements, dtype=target, pin_memory=pinned)
    step = stored.elements if target == source else _CHUNK // source.itemsize
    buffer = values if target == source else torch.empty(min(step, stored.elements), dtype=source)
    lost = 0
    try:
        with stored.file.open("rb", buffering=0) as file:
            for start in range(0, stored.elements, max(step, 1)):
                part = buffer[: min(step, stored.elements - start)]
                read_into(file, stored.start + start * source.itemsize, part)
                if target != source:
                    values[start : start + len(part)], infinite = cast(part, target)
                    lost += infinite
    except EOFError:
        raise _cut_short(stored) from None
    if lost:
        raise overflow(stored.name, lost, stored.elements, target, remedy)
    return values.view(stored.shape)


def read_chunks(stored: StoredTensor) -> Iterator[torch.Tensor]:
    """The elements of a tensor in order, (n,), a few megabytes at a time. Each overwrites the one before."""
    import torch

    source: torch.dtype = getattr(torch, _TORCH_NAMES[stored.dtype])
    buffer = torch.empty(min(_CHUNK // source.itemsize, stored.elements), dtype=source)
    try:
        with stored.file.open("rb", buffering=0) as file:
            for start in range(0, stored.elements, max(len(buffer), 1)):
                part = buffer[: stored.elements - start]
                read_into(file, stored.start + start * source.itemsize, part)
                yield part
    except EOFError:
        raise _cut_short(stored) from None


def load_rounded(
    stored: StoredTensor,
    exported: str | None,
    torch_dtype: torch.dtype | None,
    *,
    pinned: bool = False,
    remedy: str = FOR_COMPUTING,
) -> torch.Tensor:
    """As `load_tensor`, of a tensor that leaves as `exported` (None: as it is stored): rounded to that type first."""
    import torch

    if exported is None or stored.dtype_as(exported) == stored.dtype:
        return load_tensor(stored, torch_dtype, pinned=pinned, remedy=remedy)
    rounded = load_tensor(stored, getattr(torch, exported), remedy=FOR_WRITING)
    return rounded if torch_dtype is None else cast_all(rounded, torch_dtype, stored.name, remedy)


def _cut_short(stored: StoredTensor) -> ModelError:
    return ModelError(f"{str(stored.file)!r} ended inside the tensor {stored.name!r}; download it again")


def split_shards(tensors: dict[str, StoredTensor], dtype: str | None, shard_bytes: int) -> list[dict[str, StoredTensor]]:
    """Cut an ordered checkpoint into shards of at most `shard_bytes` (a larger tensor has a shard of its own)."""
    shards: list[dict[str, StoredTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.size_as(dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards


def write_folder(
    tensors: dict[str, StoredTensor], folder: Path, dtype: str | None = None, shard_bytes: int = MAX_SHARD_BYTES
) -> Iterator[tuple[str, ExportedFile]]:
    """Write a checkpoint under the names given, one shard at a time; yield each file with its size and digest.

    Peak memory is one copy chunk, whatever the size of the model. Raises `StageError` where a finite value would become infinite.
    """
    shards = split_shards(tensors, dtype, shard_bytes)
    is_single = len(shards) == 1
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if is_single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        yield name, _write_shard(shard, folder / name, dtype)
    if not is_single:
        index = {
            "metadata": {
                "total_parameters": sum(tensor.elements for tensor in tensors.values()),
                "total_size": sum(tensor.size_as(dtype) for tensor in tensors.values()),
            },
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / INDEX).write_text(text)


def _write_shard(tensors: dict[str, StoredTensor], file: Path, dtype: str | None) -> ExportedFile:
    # Wide types first: every tensor then starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1].dtype_as(dtype)])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.size_as(dtype)
        header[name] = {"dtype": tensor.dtype_as(dtype), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as target:
        for chunk in (len(encoded).to_bytes(8, "little"), encoded):
            target.write(chunk)
            digest.update(chunk)
        for _, tensor in ordered:
            with tensor.file.open("rb") as source:
                for chunk in _read_as(source, tensor, tensor.dtype_as(dtype)):
                    target.write(chunk)
                    digest.update(chunk)
    return ExportedFile(size=8 + len(encoded) + offset, sha256=digest.hexdigest())


def _read_as(source: IO[bytes], tensor: StoredTensor, dtype: str) -> Iterator[bytes]:
    source.seek(tensor.start)
    left, lost = tensor.size, 0
    while left:
        chunk = source.read(min(_CHUNK, left))
        if not chunk:
            raise _cut_short(tensor)
        left -= len(chunk)
        if dtype != tensor.dtype:
            chunk, infinite = _cast(chunk, tensor.dtype, dtype)
            lost += infinite
        yield chunk
    if lost:
        import torch

        raise overflow(tensor.name, lost, tensor.elements, getattr(torch, _FLOAT_NAMES[dtype]), FOR_WRITING)


def _cast(chunk: bytes, source: str, target: str) -> tuple[bytes, int]:
    """The bytes in another type, and how many finite values are infinite there."""
    import torch

    values = torch.frombuffer(bytearray(chunk), dtype=getattr(torch, _FLOAT_NAMES[source]))
    made, infinite = cast(values, getattr(torch, _FLOAT_NAMES[target]))
    return made.view(torch.uint8).numpy().tobytes(), infinite
