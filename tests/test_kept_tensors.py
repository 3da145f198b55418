"""Hidden states between layers come back as they were, from memory or from the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmap_pipeline.sweep.kept_tensors import KeptTensors


def make_hidden(boundary: int, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * boundary + batch)
    return torch.randn(2, 3 + batch, 4, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 0, 500, 10**6])
def test_everything_comes_back(limit: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    boundaries = KeptTensors(limit, tmp_path)
    for boundary in range(4):
        for batch in range(3):
            boundaries.put(boundary, batch, make_hidden(boundary, batch, dtype))
    for boundary in reversed(range(4)):
        for batch in range(3):
            assert torch.equal(boundaries.get(boundary, batch), make_hidden(boundary, batch, dtype))
    assert (boundaries.bytes_written > 0) == (limit in (0, 500))
    assert list(tmp_path.iterdir()) == []  # the file has no name, so a killed run leaves none


def test_lowest_go_first() -> None:
    size = make_hidden(0, 0).nbytes
    boundaries = KeptTensors(2 * size)
    for boundary in range(4):
        boundaries.put(boundary, 0, make_hidden(boundary, 0))
    assert boundaries.bytes_written == 2 * size
    boundaries.get(3, 0)
    boundaries.get(2, 0)
    assert boundaries.bytes_read == 0
    boundaries.get(1, 0)
    assert boundaries.bytes_read == size


def test_place_in_the_file_is_used_again() -> None:
    boundaries = KeptTensors(0)
    boundaries.put(0, 0, make_hidden(0, 0))
    for _ in range(5):
        for boundary in range(1, 4):
            boundaries.put(boundary, 0, make_hidden(boundary, 0))
        boundaries.drop_from(1)
    assert boundaries._file is not None
    assert boundaries._file.seek(0, 2) <= 4 * make_hidden(0, 0).nbytes
    assert torch.equal(boundaries.get(0, 0), make_hidden(0, 0))


def test_dropped_boundaries_are_gone() -> None:
    boundaries = KeptTensors()
    for boundary in range(3):
        boundaries.put(boundary, 0, make_hidden(boundary, 0))
    boundaries.drop(0)
    with pytest.raises(KeyError):
        boundaries.get(0, 0)
    assert torch.equal(boundaries.get(1, 0), make_hidden(1, 0))
