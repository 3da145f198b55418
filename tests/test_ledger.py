"""What a sweep plans for each line of memory, against what it holds there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from walk import make_model

from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.errors import PluginError
from gradmap_pipeline.sweep import sweep as door
from gradmap_pipeline.sweep.ledger import Ledger
from gradmap_pipeline.sweep.memory_plan import SweepPlan, plan_sweep
from gradmap_pipeline.sweep.needs import SweepNeeds
from gradmap_pipeline.sweep.sweep import Need, Sweep, open_sweep
from gradmap_pipeline.testing import make_context

SAMPLES, TOKENS = 12, 40


def test_a_ledger_knows_the_most_it_held() -> None:
    ledger = Ledger()
    ledger.add("gradients", 5)
    with ledger.holding("gradients", 7):
        assert ledger.held == {"gradients": 12}
    ledger.add("gradients", -5)
    assert (ledger.held, ledger.peaks) == ({"gradients": 0}, {"gradients": 12})


def make_samples(*, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 90, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(SAMPLES):
            mask[row, TOKENS - row % 5 - 1 :] = 0
    return ids, mask


def open_tight(
    folder: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, need: Need, *, padded: bool, keep: Literal["none", "all"]
) -> tuple[Sweep, SweepNeeds]:
    """A sweep with room for one layer, three samples a batch, and a quarter of what it keeps."""
    graph = open_folder(make_model(folder / "model", architecture))
    planned: list[SweepNeeds] = []

    def plan_tight(needs: SweepNeeds, free: int, **options: Any) -> SweepPlan:
        planned.append(needs)
        plan = plan_sweep(needs, free, **options)
        limit = needs.samples * needs.kept_bytes // 4
        return replace(plan, is_resident=False, reads_ahead=False, keeps_graphs=False, batch_samples=3, passes=1, kept_limit=limit)

    monkeypatch.setattr(door, "plan_sweep", plan_tight)
    sweep = open_sweep(graph, make_samples(padded=padded), make_context(folder / "step"), need=need, keep=keep)
    return sweep, planned[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need", ["forward", "backward", "weight gradients"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_no_line_takes_more_than_planned(
    architecture: str, need: Need, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, needs = open_tight(tmp_path, monkeypatch, architecture, need, padded=padded, keep="none")
    with sweep:
        for step in sweep.forward() if need == "forward" else sweep.backward():
            for _ in step:
                pass
        if need == "forward":
            assert all(losses.isfinite().all() for losses in sweep.losses())
        peaks, limit = dict(sweep.ledger.peaks), sweep.plan.kept_limit
        kept = sweep.kept
    assert 0 < peaks["layer weights"] <= needs.layer_bytes
    assert 0 < peaks["logits"] <= needs.count_logit_bytes(3)
    # Of what is kept, one tensor that has just been put there may be over the limit.
    together = peaks["hidden states"] + peaks.get("gradients", 0)
    assert 0.9 * 3 * needs.boundary_bytes <= together
    assert max(peaks["hidden states"], peaks.get("gradients", 0)) <= limit + 3 * needs.boundary_bytes
    arguments = SAMPLES * needs.count_own_arguments(3) if padded else 3 * needs.argument_bytes + needs.fixed_argument_bytes
    assert 0 < peaks["layer arguments"] <= arguments
    if need == "weight gradients":
        assert 0 < peaks["weight gradients"] <= needs.weight_gradient_bytes
    assert kept.bytes_written > 0
    assert sweep.kept._places() == []


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_calls_that_are_the_same_are_kept_once(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}
    for padded in (False, True):
        sweep, _ = open_tight(tmp_path / str(padded), monkeypatch, architecture, "forward", padded=padded, keep="all")
        with sweep:
            sweep.open_only_pass()
            sizes[padded] = sweep.ledger.peaks["layer arguments"]
    assert sizes[True] > 2.5 * sizes[False]  # four batches, each with a mask of its own


def test_a_pass_that_keeps_nothing_holds_one_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}
    for keep in ("none", "all"):
        sweep, needs = open_tight(tmp_path / keep, monkeypatch, "llama", "forward", padded=False, keep=keep)  # type: ignore[arg-type]
        sweep.kept.limit_bytes = None
        with sweep:
            for step in sweep.forward():
                for _ in step:
                    pass
            sizes[keep] = sweep.ledger.peaks["hidden states"] / (SAMPLES * needs.boundary_bytes)
    assert sizes == {"none": 1.0, "all": needs.layers + 1}


def test_what_is_not_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, _ = open_tight(tmp_path, monkeypatch, "llama", "forward", padded=False, keep="none")
    with sweep:
        samples = sweep.open_only_pass()
        with pytest.raises(PluginError, match=r"hidden states before layer 3 are not known yet: run the layers below it first"):
            samples.boundary(3, 0)
        samples.run_forward()
        with pytest.raises(PluginError, match=r"hidden states before layer 2 are not kept: open the sweep with keep='all'"):
            samples.boundary(2, 0)
        with pytest.raises(PluginError, match="a loss without a layer starts from hidden states below it, which are not kept"):
            samples.loss_without(1)
        assert samples.boundary(6, 0).shape == (3, TOKENS, 32)
