"""Shards are read and written as safetensors' own library does, without a tensor in memory."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradmap_pipeline.checkpoint import checkpoint
from gradmap_pipeline.checkpoint.checkpoint import load_tensor, read_folder, read_header, split_shards, write_folder
from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.machine.digests import sha256_of


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(5, 3, generator=generator),
        "a": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.arange(6).reshape(2, 3),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
    }


@pytest.fixture
def file(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_header_and_values(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    header = read_header(file)
    assert {name: entry.shape for name, entry in header.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert {name: entry.size for name, entry in header.items()} == {name: t.nbytes for name, t in tensors.items()}
    loaded = {name: load_tensor(entry) for name, entry in header.items()}
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in tensors.items())


@pytest.mark.parametrize("shard_bytes", [10**9, 60, 1])
@pytest.mark.parametrize("chunk", [8, 1 << 20])
def test_written_files_are_those_of_the_library(
    file: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, shard_bytes: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_CHUNK", chunk)
    target = tmp_path / "out"
    target.mkdir()
    written = dict(write_folder(read_header(file), target, shard_bytes=shard_bytes))
    together: dict[str, torch.Tensor] = {}
    for name, described in written.items():
        assert described.sha256 == sha256_of(target / name)
        assert described.size == (target / name).stat().st_size
        together |= load_file(target / name)
    assert together.keys() == tensors.keys()
    assert all(torch.equal(together[name], value) and together[name].dtype == value.dtype for name, value in tensors.items())
    assert all(entry.start % value.element_size() == 0 for entry, value in _aligned(target, tensors))
    if len(written) > 1:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
        assert {name: index["weight_map"][name] for name in tensors} == {n: e.file.name for n, e in read_folder(target).items()}


def _aligned(folder: Path, tensors: dict[str, torch.Tensor]) -> list[Any]:
    return [(entry, tensors[name]) for name, entry in read_folder(folder).items()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cast_is_that_of_torch_and_leaves_integers(
    file: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, dtype: str
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    list(write_folder(read_header(file), target, dtype))
    loaded = load_file(target / "model.safetensors")
    for name, value in tensors.items():
        wanted = value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        assert loaded[name].dtype == wanted.dtype
        assert torch.equal(loaded[name], wanted)


def test_a_shard_is_full_before_the_next_is_opened(file: Path) -> None:
    header = read_header(file)
    sizes = [[entry.size for entry in shard.values()] for shard in split_shards(header, None, 62)]
    assert all(sum(shard) <= 62 or len(shard) == 1 for shard in sizes)
    assert all(sum(shard) + following[0] > 62 for shard, following in pairwise(sizes))


def test_file_that_is_cut_short(file: Path) -> None:
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match=rf"it has {size - 8} bytes, which is not what its header says; download it again"):
        read_header(file)


@pytest.mark.parametrize("content", [b"", bytes(100)])
def test_file_that_is_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is not a complete safetensors file"):
        read_folder(tmp_path)


def test_quantised_types_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"holds 'weight' of type F8_E4M3; prune a checkpoint that is not quantised"):
        read_folder(tmp_path)


def test_missing_shard_is_named(file: Path) -> None:
    folder = file.parent
    list(write_folder(read_header(file), folder, shard_bytes=60))
    file.unlink()
    (folder / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    (folder / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"lacks the shard 'model-00002-of-0000\d\.safetensors' that its index names"):
        read_folder(folder)


def test_shards_without_an_index(file: Path) -> None:
    folder = file.parent
    file.rename(folder / "model-1.safetensors")
    (folder / "model-2.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"has 2 safetensors files but no model\.safetensors\.index\.json"):
        read_folder(folder)


def test_source_that_shrinks_while_it_is_copied(file: Path, tmp_path: Path) -> None:
    header = read_header(file)
    file.write_bytes(file.read_bytes()[:-4])
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="ended inside the tensor"):
        list(write_folder(header, tmp_path / "out"))
