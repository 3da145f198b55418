"""What the stand-in device refuses, so that the other tests on it mean something: mistakes that a GPU punishes."""

from __future__ import annotations

import pytest
import torch

standin = pytest.importorskip("standin")
FIRST, SECOND = torch.device("standin:0"), torch.device("standin:1")


@pytest.fixture(autouse=True)
def _no_faults_left() -> None:
    standin.native.take_faults()
    torch.accelerator.synchronize(FIRST)


@pytest.mark.parametrize("other", [torch.device("cpu"), SECOND])
def test_tensors_of_two_devices_in_one_operation(other: torch.device) -> None:
    here, there = torch.ones(3, 3, device=FIRST), torch.ones(3, 3, device=other)
    for operation in (torch.add, torch.matmul, torch.maximum, lambda one, two: one[two.long()], torch.equal):
        with pytest.raises(RuntimeError, match="same device"):
            operation(here, there)
    assert (here + 1).device == FIRST
    assert (here * torch.tensor(2.0)).sum().item() == 18  # a number is no tensor of another device


def test_its_memory_in_code_for_the_cpu() -> None:
    with pytest.raises(TypeError, match="can't convert standin:0 device type tensor to numpy"):
        torch.ones(3, device=FIRST).numpy()


def test_new_memory_holds_no_numbers() -> None:
    assert torch.empty(100, device=FIRST).isnan().all()


def test_memory_that_another_stream_writes() -> None:
    side = torch.Stream(FIRST)
    with side:
        made = torch.ones(4, device=FIRST) * 2
    with pytest.raises(RuntimeError, match=r"add on the default stream uses memory that stream \d+ writes without waiting"):
        made + 1
    torch.accelerator.current_stream(FIRST).wait_event(side.record_event())
    assert (made + 1).sum().item() == 12


def test_writing_what_another_stream_reads() -> None:
    side = torch.Stream(FIRST)
    made = torch.ones(4, device=FIRST)
    side.wait_event(torch.accelerator.current_stream(FIRST).record_event())
    with side:
        made + 1
    with pytest.raises(RuntimeError, match="reads without waiting"):
        made.zero_()


@pytest.mark.parametrize("is_recorded", [False, True])
def test_memory_that_is_freed_while_another_stream_uses_it(is_recorded: bool) -> None:
    side = torch.Stream(FIRST)
    made = torch.ones(4, device=FIRST)
    side.wait_event(torch.accelerator.current_stream(FIRST).record_event())
    with side:
        made + 1
    if is_recorded:
        made.record_stream(side)
    del made
    faults = standin.native.take_faults()
    assert faults == [] if is_recorded else "may still use it: call record_stream" in faults[0]


def test_a_copy_that_does_not_block_is_late_both_ways() -> None:
    """From the device the host must wait; to the device the host must leave its memory alone until then."""
    on_host = torch.zeros(3, pin_memory=True)
    on_host.copy_(torch.arange(3.0, device=FIRST), non_blocking=True)
    assert on_host.isnan().all()
    torch.accelerator.synchronize(FIRST)
    assert torch.equal(on_host, torch.arange(3.0))
    on_device = on_host.to(FIRST, non_blocking=True)
    on_host.fill_(7)
    assert torch.equal(on_device.cpu(), torch.full((3,), 7.0))


def test_memory_is_counted() -> None:
    before = torch.standin.memory_allocated(FIRST)
    torch.standin.reset_peak_memory_stats(FIRST)
    made = [torch.empty(1000, device=FIRST) for _ in range(3)]
    del made[0]
    assert torch.standin.memory_allocated(FIRST) == before + 8000
    assert torch.standin.max_memory_allocated(FIRST) == before + 12000
    pinned = standin.native.pinned_held()
    held = torch.empty(10, pin_memory=True)
    assert held.is_pinned()
    assert not torch.empty(10).is_pinned()
    assert standin.native.pinned_held() == pinned + 40
