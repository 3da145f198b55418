"""Hidden states between layers come back as they were, from memory or from the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmap_pipeline.sweep.kept_tensors import GRADIENTS, KeptTensors
from gradmap_pipeline.sweep.ledger import Ledger


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


def test_what_comes_again_last_goes_first() -> None:
    """Going up, each layer reads the boundary below it; then the top is used first, so the lowest are in the file."""
    size = make_hidden(0, 0).nbytes
    boundaries = KeptTensors(2 * size)
    boundaries.put(0, 0, make_hidden(0, 0))
    for boundary in range(1, 4):
        boundaries.get(boundary - 1, 0)
        boundaries.put(boundary, 0, make_hidden(boundary, 0))
    assert boundaries.bytes_written == 2 * size
    boundaries.is_going_down = True
    boundaries.get(3, 0)
    boundaries.get(2, 0)
    assert boundaries.bytes_read == 0
    boundaries.get(1, 0)
    assert boundaries.bytes_read == size


def test_of_one_boundary_the_batches_that_come_next_stay() -> None:
    """Only what has no room goes through the file; not each batch in turn just before it is used."""
    kept = KeptTensors(3 * 16)
    for batch in range(4):
        kept.put(0, batch, torch.full((4,), float(batch)))
    assert kept.bytes_written == 16
    for boundary in range(1, 5):
        for batch in range(4):
            assert torch.equal(kept.get(boundary - 1, batch), torch.full((4,), float(batch)))
            kept.forget(boundary - 1, batch)
            kept.put(boundary, batch, torch.full((4,), float(batch)))
    assert kept.bytes_written == kept.bytes_read + 16 <= 5 * 16


def test_place_in_the_file_is_used_again() -> None:
    boundaries = KeptTensors(0)
    boundaries.put(0, 0, make_hidden(0, 0))
    for _ in range(5):
        for boundary in range(1, 4):
            boundaries.put(boundary, 0, make_hidden(boundary, 0))
        boundaries.drop_from(1)
    assert boundaries._file._file is not None
    assert boundaries._file._file.seek(0, 2) <= 4 * make_hidden(0, 0).nbytes
    assert torch.equal(boundaries.get(0, 0), make_hidden(0, 0))


def test_dropped_boundaries_are_gone() -> None:
    boundaries = KeptTensors()
    for boundary in range(3):
        boundaries.put(boundary, 0, make_hidden(boundary, 0))
    boundaries.drop(0)
    with pytest.raises(KeyError):
        boundaries.get(0, 0)
    assert torch.equal(boundaries.get(1, 0), make_hidden(1, 0))


def test_a_tensor_takes_the_place_of_another() -> None:
    ledger = Ledger()
    kept = KeptTensors(0, ledger=ledger)
    for value in (1.0, 2.0, 3.0):
        kept.put(GRADIENTS, 0, torch.full((4,), value))
        kept.put(0, 0, torch.zeros(2))
    assert torch.equal(kept.get(GRADIENTS, 0), torch.full((4,), 3.0))
    assert ledger.peaks["gradients"] == 16
    kept.clear()
    assert ledger.held == {"gradients": 0, "hidden states": 0}


def test_parts_of_the_file_that_are_free_are_joined() -> None:
    """A larger tensor fits where two smaller ones were; the file is as long as what is held at a time."""
    kept = KeptTensors(0)
    for batch in range(3):
        kept.put(0, batch, torch.full((4,), float(batch)))
    kept.put(1, 0, torch.zeros(1))
    kept.forget(0, 0)
    kept.forget(0, 1)
    kept.put(2, 0, torch.arange(8.0))
    assert kept._file._file is not None
    assert kept._file._file.seek(0, 2) == 3 * 16 + 4  # eight numbers where eight were, and the single one
    assert torch.equal(kept.get(2, 0), torch.arange(8.0))
    assert torch.equal(kept.get(0, 2), torch.full((4,), 2.0))
