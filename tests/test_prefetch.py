"""The next layer is read while this one computes, and what is read is what would have been read."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest
import torch

from gradmap_pipeline.batches import make_batches
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.prefetch import Prefetcher
from gradmap_pipeline.sweep.sample_pass import SamplePass

CPU = torch.device("cpu")


def test_reading_goes_on_beside_other_work() -> None:
    begun, wanted = Event(), Event()

    def read() -> dict[str, torch.Tensor]:
        begun.set()
        assert wanted.wait(10)
        return {"weight": torch.ones(3)}

    prefetcher = Prefetcher(CPU)
    prefetcher.start(4, read)
    assert begun.wait(10)  # while this thread does something else
    wanted.set()
    taken = prefetcher.take(4)
    assert taken is not None
    assert torch.equal(taken["weight"], torch.ones(3))
    assert prefetcher.take(4) is None


def test_another_layer_takes_its_place() -> None:
    prefetcher = Prefetcher(CPU)
    prefetcher.start(1, lambda: {"weight": torch.zeros(1)})
    prefetcher.start(2, lambda: {"weight": torch.ones(1)})
    assert prefetcher.take(1) is None
    prefetcher.start(2, lambda: {"weight": torch.ones(1)})
    assert prefetcher.take(2) == {"weight": torch.ones(1)}


def test_what_goes_wrong_is_raised_where_the_layer_is_used() -> None:
    def read() -> dict[str, torch.Tensor]:
        raise ModelError("ended inside the tensor")

    prefetcher = Prefetcher(CPU)
    prefetcher.start(0, read)
    with pytest.raises(ModelError, match="ended inside"):
        prefetcher.take(0)


def test_a_sweep_reads_ahead_in_both_directions(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer but the first of each direction comes from the prefetcher, with the results of a sweep without it."""
    ids = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    taken: list[int] = []
    take = Prefetcher.take

    def count(self: Prefetcher, layer: int) -> dict[str, torch.Tensor] | None:
        weights = take(self, layer)
        taken.extend([layer] if weights is not None else [])
        return weights

    monkeypatch.setattr(Prefetcher, "take", count)
    for ahead in (False, True):
        model = LayerwiseModel(open_folder(llama), resident_bytes=0)
        model.weights.reads_ahead = ahead
        sweep = SamplePass(model, make_batches(ids, torch.ones_like(ids)))
        gradients.append([visit.gradient for step in sweep.backward() for visit in step])
        assert taken == ([1, 2, 3, 2, 1, 0] if ahead else [])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_sweep_that_ends_early_leaves_nothing_on_its_way(llama: Path) -> None:
    model = LayerwiseModel(open_folder(llama), resident_bytes=0)
    model.weights.reads_ahead = True
    ids = torch.full((2, 8), 5)
    forward = SamplePass(model, make_batches(ids, torch.ones_like(ids))).forward()
    assert next(forward).layer == 0
    assert model.weights._prefetcher._coming is not None
    del forward
    assert model.weights._prefetcher._coming is None
